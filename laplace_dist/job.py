"""A job from settings to result: the order of the stages, open, map, reduce, tune and evaluate, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from laplace_dist.config import compatibility
from laplace_dist.config.import_path import IMPORT_PATH
from laplace_dist.config.settings import Config
from laplace_dist.data import sources
from laplace_dist.errors import MissingObjectError, SettingsError
from laplace_dist.execution.session import ExecutorType, Session
from laplace_dist.execution.tasks import Task
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import plan_shards
from laplace_dist.report.progress import Progress
from laplace_dist.run import (
    decompositions,
    evaluations,
    layout,
    lifecycle,
    ownership,
    partials,
    place,
    pointer,
    tunings,
    versions,
    windows,
)
from laplace_dist.run.checkpoint import open_json, open_store
from laplace_dist.run.combination import Term, Window, alone
from laplace_dist.stages import decompose, evaluate, map, opening, reduce, tune, words
from laplace_dist.stages.search import Search
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Result:
    """What a job leaves behind.

    Attributes:
        checkpoint: Directory or URL of the run.
        version: Posterior version, or None.
        tuning: Key of the tuning in force, or None.
        metrics: For `map` and `laplace` the metrics by name, or None if not evaluated.
        notes: What belongs beside them: the noise or temperature that they are of, and what the tuning said.
        helps: False where a tuning has found nothing better than MAP, and has kept the limit in which the posterior is that.
    """

    checkpoint: str
    version: str | None = None
    tuning: str | None = None
    metrics: dict[str, dict[str, float]] | None = None
    notes: tuple[str, ...] = ()
    helps: bool = True


# ------------------------------------------------------------------ jobs


def fit(config: Config, executor: ExecutorType | None = None) -> Result:
    """Fit a Laplace approximation; then tune its prior and evaluate it, unless the settings say not to.

    What is already committed under the checkpoint is kept: running it again continues, or changes nothing.

    Args:
        config: The settings.
        executor: Where the tasks are carried out, such as `Inline`; what `--ray-address` says if not given.

    Raises:
        SettingsError: The settings or the state are refused; nothing was changed.
        RunFailed: The run cannot go on; everything committed is kept.
        CheckpointError: An object of the checkpoint is missing, truncated or altered.
    """
    with Job(config, executor) as job:
        job.open()
        job.map()
        version = job.reduce()
        return _follow_on(job, version, tuning=not config.skip_tune, evaluation=not config.skip_evaluate)


def tune_posterior(config: Config, executor: ExecutorType | None = None) -> Result:
    """Tune the prior precision of a run's current posterior; arguments and errors as of `fit`."""
    with Job(config, executor) as job:
        return _follow_on(job, job.current_version(), tuning=True, evaluation=False)


def evaluate_posterior(config: Config, executor: ExecutorType | None = None) -> Result:
    """Evaluate a run's current posterior with the tuning in force; arguments and errors as of `fit`."""
    with Job(config, executor) as job:
        return _follow_on(job, job.current_version(), tuning=False, evaluation=True)


def _follow_on(job: Job, version: str, *, tuning: bool, evaluation: bool) -> Result:
    key = job.tune(version) if tuning else pointer.read_current(job.store)["tuning"]
    metrics = job.evaluate(version, key) if evaluation else None
    tuned = {"sigma_noise": None} if key is None else tunings.read_tuning(job.store, key)[0]
    return Result(job.store.url, version, key, metrics, tuple(tunings.notes(tuned)), tunings.helps(tuned))


@dataclass
class Job:
    """The stages of a job over one checkpoint. A stage asks the store what is done and submits tasks for the rest.

    Nothing here holds a factor: tasks return small receipts, and Ray is joined when the first task is submitted.

    Attributes:
        given: The settings as given; relative paths are made absolute, since workers may have another directory.
        executor: Where the tasks are carried out, such as `Inline`; what `--ray-address` says if not given.
        say: Where lines for people go.
    """

    given: Config
    executor: ExecutorType | None = None
    say: Callable[[str], None] = lambda text: print(text, flush=True)
    _continued: bool = field(default=False, init=False)
    _checked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.config = _absolute(self.given)
        self.store: Store = open_store(self.config)
        self.session = Session(self.config, self.store, self.executor, lambda text: self.say(text))

    @cached_property
    def device_type(self) -> str:
        """Where the workers compute, `cpu` or `cuda`: as the settings say, else as the run has begun, else as there are."""
        if self.config.device != "auto":
            return self.config.device
        if self.store.exists(layout.PLAN) and not self.config.fresh:
            return self.plan.settings["device_type"]
        return self.session.executor.device_type()

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run at the checkpoint."""
        return ownership.read_plan(self.store)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

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
        place.check_place(self.store)
        resolved = opening.resolve(config)
        self._checked = True
        self.store.check_writable()  # before a cluster may be asked for its devices
        self.plan, self._continued = opening.begin(resolved, config, self.store, self.device_type, self.say)
        self.window = Window(self.store, self.plan)
        self.say(f"{'continuing' if self._continued else 'starting'} the run at {self.store.url}")
        if not self._continued:
            self.say(str(resolved.la.coverage))

    def map(self) -> None:
        """Accumulate the segments of the window that have no committed partial."""
        store, plan = self.window.store, self.window.plan
        done = lifecycle.committed(store, plan, arrays=False, say=lambda text: self.say(f"map: {text}"))
        if self._continued and len(done) < len(plan.segments):
            comparisons = map.comparisons(plan, done)
            self._run(comparisons, Progress("map", "segments compared with the data", len(comparisons)))
        self._run(map.tasks(plan, done), Progress("map", "segments", len(plan.segments), len(done)))

    def reduce(self) -> str:
        """Sum the partials to a posterior version, if that is not done yet, and make it current."""
        if (done := self._version_of_0_1()) is not None:
            return done
        version = self.combine(alone(self.store, self.plan, self.sum_window()))
        pointer.write_current(self.store, self.plan, version, None, first=True)
        current = pointer.read_current(self.store)
        if current.get("history"):
            self.say(
                f"reduce: version {current['version']} is current, which a recalibration has promoted, and stays so"
            )
            return current["version"]
        tuned = current["tuning"] is None or ownership.has(self.store, self.plan, current["tuning"])
        if current["version"] != version or not tuned:
            pointer.write_current(self.store, self.plan, version, None)
        return version

    def sum_window(self) -> dict[str, Any]:
        """Sum the parts of the window that are not summed yet and commit its sum; returns its manifest."""
        store, plan = self.window.store, self.window.plan
        if (done := windows.find_window(store, plan)) is not None:
            return done
        manifests = list(partials.manifests(store, plan))
        tasks = reduce.part_tasks(store, plan, manifests)
        self._run(tasks, Progress("reduce", "parts", len(plan.parts), len(plan.parts) - len(tasks)))
        return windows.commit_window(store, plan, manifests)

    def combine(self, terms: Sequence[Term]) -> str:
        """Commit the posterior version that windows make, if that is not done yet; returns its name."""
        version = versions.version_of(terms)
        if not ownership.has(self.store, self.plan, layout.version_key(version)):
            tasks = reduce.factor_tasks(self.plan, terms)
            receipts = self._run(tasks, Progress("reduce", "groups of factors", len(tasks)), keep=True, alike=False)
            versions.commit_version(self.store, self.plan, terms, [receipt["factors"] for receipt in receipts])
        return version

    def _version_of_0_1(self) -> str | None:
        """Return the posterior version of a finished run of 0.1, whose sums were not kept apart from it."""
        if self.plan.format_version > 1 or not self.store.exists(layout.CURRENT):
            return None
        return pointer.read_current(self.store)["version"]

    # -------------------------------------------------------------- the follow-on stages

    def tune(self, version: str) -> str:
        """Tune the prior precision of a posterior version, put it in force, and return the key of the tuning."""
        key = self.choose_prior(version)
        pointer.write_current(self.store, self.plan, version, key)
        return key

    def decompose(self, version: str) -> None:
        """Commit the eigendecompositions of a version's large factors that are not there yet."""
        if names := decompositions.missing(self.store, self.plan, version):
            tasks = decompose.tasks(self.plan, version, names)
            self._run(tasks, Progress("decompose", "groups of factors", len(tasks)), alike=False)

    def choose_prior(self, version: str, start: str | None = None) -> str:
        """Tune a posterior version and return the key of the tuning.

        Args:
            version: The posterior version.
            start: The tuning whose prior is kept where the temperature alone is tuned; the one in force if not given.
        """
        config = self.config
        compatibility.check_predictive(config)
        splits = self._splits("val") if config.searches else {}
        if not config.searches_prior and config.recalibrate != "temperature":
            self._choose(
                version, None, start := layout.tuning_key(version, tune.settings(config, None, self.device_type))
            )
        if not config.searches:
            return start
        found = opening.fingerprint(config, splits["val"], "val")
        start = None if config.searches_prior else tunings.start_of(self.store, start or pointer.tuning_of(self.store))
        chosen = tune.settings(config, found, self.device_type, start)
        key = layout.tuning_key(version, chosen)
        shards = plan_shards(len(splits["val"]), config.batch_size)
        self._choose(
            version, Search(self.store, self.plan, version, key, chosen, config, shards, start, self._tune), key
        )
        return key

    def _choose(self, version: str, search: Search | None, key: str) -> None:
        """Commit a tuning, by a search or by the evidence, if that is not done yet, and say what it is."""
        if not ownership.has(self.store, self.plan, key):
            if search is not None:
                self.decompose(version)
                task: Task = search.choose()
            else:
                chosen = tune.settings(self.config, None, self.device_type)
                task = tune.MaximizeEvidence(self.plan.digest, version, key, chosen)
            self._tune([task], "results", 1, 0)
        manifest, value = tunings.read_tuning(self.store, key)
        method, temperature = manifest["settings"]["method"], manifest.get("logit_temperature") or 1.0
        self.say(f"tune: {words.chosen(value, manifest['sigma_noise'], temperature, method)}")
        for text in (manifest.get("search") or {}).get("said", []):
            self.say(f"tune: {text}")

    def _tune(self, tasks: Sequence[Task], unit: str, total: int, done: int) -> list[Mapping[str, Any]]:
        return self._run(tasks, Progress("tune", unit, total, done), keep=True)

    def evaluate(self, version: str, tuning: str | None) -> dict[str, dict[str, float]]:
        """Evaluate MAP and Laplace, put the metrics where people look for them, and return those of both."""
        metrics = open_json(self.store.read(key := self.score(version, tuning)), key)["metrics"]
        ownership.confirm(self.store, self.plan)
        self.store.replace(layout.METRICS, evaluations.metrics_json(version, tuning, metrics))
        return metrics

    def score(self, version: str, tuning: str | None) -> str:
        """Score MAP and Laplace on the test and out-of-distribution splits and return the key of the evaluation."""
        config = self.config
        compatibility.check_predictive(config)
        splits = self._splits(*compatibility.evaluated(config))
        found = {name: opening.fingerprint(config, split, name) for name, split in splits.items()}
        chosen = evaluate.settings(config, tuning, found, self.device_type)
        key = layout.evaluation_key(version, chosen)
        if not ownership.has(self.store, self.plan, key):
            shards = [(name, s) for name, split in splits.items() for s in plan_shards(len(split), config.batch_size)]
            if self.plan.spec["structure"] == "kron":  # a dense precision has a root that costs less
                self.decompose(version)
            tasks, done = evaluate.shard_tasks(self.store, self.plan, version, tuning, key, found, shards)
            self._run(tasks, Progress("evaluate", "shards", len(shards), done))
            ids = {name: [s.id for other, s in shards if other == name] for name in splits}
            summary = evaluate.Summarize(self.plan.digest, key, chosen, ids)
            self._run([summary], Progress("evaluate", "results", 1))
        return key

    def _splits(self, *names: str) -> dict[str, Any]:
        """Load splits; those of a follow-on job are looked at before anything starts, as a fit looks at all of them."""
        splits = {name: sources.load_split(self.config, name) for name in names}
        if not self._checked:
            opening.check_again(self.config, self.store, self.plan, splits)
        return splits

    def _run(self, tasks: Iterable[Task], progress: Progress, **how: bool) -> list[Mapping[str, Any]]:
        """Carry out the tasks of a stage; see `Session.run`."""
        return self.session.run(tasks, self.device_type, progress, **how)


def _absolute(config: Config) -> Config:
    """Return the settings with relative paths, and those that begin with `~`, made absolute."""
    data = None if IMPORT_PATH.fullmatch(config.data) else config.data
    paths = {"checkpoint": config.checkpoint, "weights": config.weights, "data": data}
    return config.model_copy(
        update={
            name: os.path.abspath(os.path.expanduser(path))
            for name, path in paths.items()
            if path and "://" not in path
        }
    )
