"""A job from settings to result: plan, then map, reduce, tune and evaluate, each through the one loop of `loop.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from laplace_dist.config import compatibility
from laplace_dist.config.settings import Config
from laplace_dist.data import sources
from laplace_dist.errors import ExampleError, MissingObjectError, SettingsError
from laplace_dist.execution.loop import run_tasks
from laplace_dist.execution.pool import Pool
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.execution.tasks import Task
from laplace_dist.execution.timeouts import Limit
from laplace_dist.plan import identity
from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.plan.segments import Segment, default_segment_size, plan_segments
from laplace_dist.report.progress import Progress
from laplace_dist.run import layout, lifecycle, pointer, tunings, versions, weights
from laplace_dist.run.checkpoint import open_json, open_store
from laplace_dist.run.weights import dump_weights, weights_digest
from laplace_dist.stages import evaluate, reduce, tune
from laplace_dist.stages.context import initialized, plain
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Result:
    """What a job leaves behind.

    Attributes:
        checkpoint: Directory or URL of the run.
        version: Posterior version, or None.
        tuning: Key of the tuning in force, or None.
        metrics: For `map` and `laplace` the metrics by name, or None if not evaluated.
    """

    checkpoint: str
    version: str | None = None
    tuning: str | None = None
    metrics: dict[str, dict[str, float]] | None = None


# ------------------------------------------------------------------ jobs


def fit(config: Config) -> Result:
    """Fit a Laplace approximation; then tune its prior and evaluate it, unless the settings say not to.

    What is already committed under the checkpoint is kept: running it again continues, or changes nothing.

    Raises:
        SettingsError: The settings or the state are refused; nothing was changed.
        RunFailed: The run cannot go on; everything committed is kept.
        CheckpointError: An object of the checkpoint is missing, truncated or altered.
    """
    with Job(config) as job:
        job.open()
        job.map()
        version = job.reduce()
        return _follow_on(job, version, tuning=not config.skip_tune, evaluation=not config.skip_evaluate)


def tune_posterior(config: Config) -> Result:
    """Tune the prior precision of a run's current posterior; raises as `fit`."""
    with Job(config) as job:
        return _follow_on(job, job.current_version(), tuning=True, evaluation=False)


def evaluate_posterior(config: Config) -> Result:
    """Evaluate a run's current posterior with the tuning in force; raises as `fit`."""
    with Job(config) as job:
        return _follow_on(job, job.current_version(), tuning=False, evaluation=True)


def _follow_on(job: Job, version: str, *, tuning: bool, evaluation: bool) -> Result:
    key = job.tune(version) if tuning else pointer.read_current(job.store)["tuning"]
    metrics = job.evaluate(version, key) if evaluation else None
    return Result(job.store.url, version, key, metrics)


@dataclass
class Job:
    """The stages of a job over one checkpoint. A stage asks the store what is done and submits tasks for the rest.

    Nothing here holds a factor: tasks return small receipts, and Ray is joined when the first task is submitted.

    Attributes:
        given: The settings as given; relative paths are made absolute, since workers may have another directory.
        say: Where lines for people go.
    """

    given: Config
    say: Callable[[str], None] = lambda text: print(text, flush=True)
    _pool: Pool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.config = _absolute(self.given)
        self.store: Store = open_store(self.config)
        self.cluster = Cluster(self.config, self.say)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run at the checkpoint."""
        return lifecycle.read_plan(self.store)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._pool is not None:
                self._pool.close()
        finally:
            self.cluster.close()

    def current_version(self) -> str:
        """Return the posterior version that a follow-on job works on.

        The posterior's structure is the run's, whatever the settings say; the likelihood has to be given as it was for
        the fit, since what the scores of the data mean depends on it.

        Raises:
            SettingsError: The run has none yet, was fitted with another likelihood, or cannot be written to.
        """
        try:
            version = pointer.read_current(self.store)["version"]
        except MissingObjectError as error:
            raise SettingsError(f"--checkpoint: got {self.given.checkpoint!r}; {error}") from error
        stored = self.plan.settings
        likelihood = stored.get("likelihood")
        if self.config.likelihood != likelihood:
            raise SettingsError(
                f"--likelihood: got {self.config.likelihood!r}, but the run at {self.store.url!r} was fitted with "
                f"{likelihood!r}. Give --likelihood {likelihood}."
            )
        self.config = self.config.model_copy(update={"hessian_structure": stored.get("hessian_structure")})
        self.store.check_writable()
        return version

    # -------------------------------------------------------------- the stages of fit

    def open(self) -> None:
        """Resolve model, data and factors once, and start the run or continue the one that is there."""
        config = self.config
        compatibility.check_predictive(config)
        train = sources.load_split(config, "train")
        sources.check_splits(config)
        model = weights.load_model(config)
        try:
            la = initialized(config, model, train)
        except (ValueError, ImportError, ExampleError) as error:
            raise error if isinstance(error, SettingsError) else SettingsError(str(error)) from error
        found = _fingerprint(train)
        self.store.check_writable()  # before a cluster may be asked for its devices
        plan = build_plan(
            config.bits(device_type=self.cluster.device_type()),
            data=found,
            weights=weights_digest(model),
            model={"path": config.model, "args": config.model_args},
            spec=plain(la.sums_spec()),
        )
        snapshot = config.model_copy(update={"weights": f"{self.store.url}/{layout.WEIGHTS}"}).to_yaml()
        continued = lifecycle.open_run(
            self.store, plan, weights=lambda: dump_weights(model), config_yaml=snapshot, fresh=config.fresh
        )
        self.say(f"{'continuing' if continued else 'starting'} the run at {self.store.url}")
        if not continued:
            self.say(str(la.coverage))

    def map(self) -> None:
        """Accumulate the segments that have no committed partial."""
        done = lifecycle.committed(self.store, self.plan, arrays=False)
        left = lifecycle.remaining(self.plan, done)
        progress = Progress("map", "segments", len(self.plan.segments), len(done))
        tasks = (_shard_task("map:map_segment", "segment", segment, "segment") for segment in left)
        self._run(tasks, progress)

    def reduce(self) -> str:
        """Sum the partials to a posterior version, if that is not done yet, and make it current."""
        version = versions.version_of(self.store, self.plan)
        if not self.store.exists(layout.version_key(version)):
            groups = reduce.groups(self.plan.spec)
            tasks = (
                Task(
                    "laplace_dist.stages.reduce:reduce_group",
                    {"version": version, "names": names},
                    f"sum of {names[0]}, …",
                )
                for names in groups
            )
            progress = Progress("reduce", "groups of factors", len(groups))
            receipts = self._run(tasks, progress, keep=True, alike=False)
            versions.commit_version(self.store, self.plan, version, receipts)
        try:
            current = pointer.read_current(self.store)
        except MissingObjectError:
            pointer.write_current(self.store, version, None, first=True)
            return version
        if current["version"] != version:
            pointer.write_current(self.store, version, None)
        return version

    # -------------------------------------------------------------- the follow-on stages

    def tune(self, version: str) -> str:
        """Tune the prior precision of a posterior version, put it in force, and return the key of the tuning."""
        config = self.config
        compatibility.check_predictive(config)
        grid = config.tuning == "gridsearch"
        validation = sources.load_split(config, "val") if grid else None
        chosen = tune.settings(config, _fingerprint(validation) if grid else None)
        key = layout.tuning_key(version, chosen)
        common = {"version": version, "key": key}
        if not self.store.exists(key):
            last = {**common, "chosen": chosen}
            if grid:
                shards = _shards(len(validation), config.batch_size)
                todo = [s for s in shards if not self.store.exists(layout.tuning_shard_key(key, s.id))]
                tasks = (_shard_task("tune:score_shard", "validation shard", s, "shard", common) for s in todo)
                self._run(tasks, Progress("tune", "shards", len(shards), len(shards) - len(todo)))
                last["shards"] = [asdict(shard) for shard in shards]
            target = f"laplace_dist.stages.tune:{'merge_grid' if grid else 'tune_marglik'}"
            choice = Task(target, last, "tuning of the prior precision")
            receipts = self._run([choice], Progress("tune", "results", 1), keep=True)
            for warning in receipts[0].get("warnings", []):
                self.say(f"tune: warning: {warning}")
        pointer.write_current(self.store, version, key)
        manifest, value = tunings.read_tuning(self.store, key)
        shown = (
            f"{value.item():.4g}"
            if value.numel() == 1
            else f"{value.numel()} values, {value.min():.4g} to {value.max():.4g}"
        )
        noise = "" if manifest["sigma_noise"] is None else f", observation noise {manifest['sigma_noise']:.4g}"
        self.say(f"tune: prior precision {shown}{noise} ({config.tuning})")
        return key

    def evaluate(self, version: str, tuning: str | None) -> dict[str, dict[str, float]]:
        """Evaluate MAP and Laplace on the test and out-of-distribution splits and return the metrics of both."""
        config = self.config
        compatibility.check_predictive(config)
        splits = {name: sources.load_split(config, name) for name in ("test", *compatibility.ood(config))}
        chosen = evaluate.settings(config, tuning, {name: _fingerprint(split) for name, split in splits.items()})
        key = layout.evaluation_key(version, chosen)
        if not self.store.exists(key):
            shards = [(name, s) for name, split in splits.items() for s in _shards(len(split), config.batch_size)]
            todo = [
                (name, s) for name, s in shards if not self.store.exists(layout.evaluation_shard_key(key, name, s.id))
            ]
            common = {"version": version, "tuning": tuning, "key": key}
            tasks = (
                _shard_task("evaluate:evaluate_shard", f"{name} shard", s, "shard", {**common, "split": name})
                for name, s in todo
            )
            self._run(tasks, Progress("evaluate", "shards", len(shards), len(shards) - len(todo)))
            ids = {name: [s.id for other, s in shards if other == name] for name in splits}
            arguments = {"key": key, "chosen": chosen, "shards": ids}
            summary = Task("laplace_dist.stages.evaluate:summarize", arguments, "summary of the scores")
            self._run([summary], Progress("evaluate", "results", 1))
        metrics = open_json(self.store.read(key), key)["metrics"]
        self.store.replace(layout.METRICS, evaluate.metrics_json(version, tuning, metrics))
        return metrics

    def _run(self, tasks: Iterable[Task], progress: Progress, *, keep: bool = False, alike: bool = True) -> list[Any]:
        """Carry out the tasks of a stage.

        Args:
            tasks: Of the stage.
            progress: Of the stage.
            keep: Return the receipts.
            alike: The tasks are of about one size, so that the time of those that finish says when one hangs; where they
                are not, only a limit that the user gave holds.
        """
        kept: list[Any] = []
        tasks = iter(tasks)
        first = next(tasks, None)
        if first is None:
            return kept
        if self._pool is None:
            self._pool = self.cluster.pool()
        given = self.config.segment_timeout

        def on_done(_: Task, receipt: Mapping[str, Any]) -> None:
            progress.done(receipt.get("examples", 0))
            if keep:
                kept.append(receipt)

        run_tasks(
            self._pool,
            chain([first], tasks),
            on_done,
            limit=Limit(given if alike or given is not None else float("inf")),
            tick=lambda: progress.tick(self._pool.busy),
            say=lambda text: self.say(f"{progress.stage}: {text}"),
        )
        return kept


def _fingerprint(dataset: Any) -> dict[str, Any]:
    """Return a split's fingerprint; an example that this process cannot read is refused as a setting is.

    Raises:
        SettingsError: Naming the example.
    """
    try:
        return identity.fingerprint(dataset)
    except ExampleError as error:
        raise SettingsError(str(error)) from error


def _shards(n: int, batch_size: int) -> list[Segment]:
    return plan_segments(n, default_segment_size(n, batch_size), batch_size)


def _shard_task(target: str, noun: str, shard: Segment, argument: str, common: Mapping[str, Any] | None = None) -> Task:
    """Return a task over a range of examples, named after it."""
    what = f"{noun} {shard.id} (examples {shard.start} to {shard.stop - 1})"
    return Task(f"laplace_dist.stages.{target}", {**(common or {}), argument: asdict(shard)}, what)


def _absolute(config: Config) -> Config:
    """Return the settings with relative paths, and those that begin with `~`, made absolute."""
    paths = {"checkpoint": config.checkpoint, "weights": config.weights}
    return config.model_copy(
        update={
            name: os.path.abspath(os.path.expanduser(path))
            for name, path in paths.items()
            if path and "://" not in path
        }
    )
