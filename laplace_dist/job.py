"""A job from settings to result: the order of the stages, open, map, reduce, tune, evaluate and report, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_dist.config import compatibility
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.data import sources
from laplace_dist.data.groups import groups_of
from laplace_dist.errors import SettingsError, StorageError
from laplace_dist.execution.session import ExecutorType
from laplace_dist.execution.tasks import Task
from laplace_dist.fit_stages import FitStages
from laplace_dist.plan.segments import plan_shards
from laplace_dist.report.progress import Progress
from laplace_dist.run import decompositions, evaluations, layout, ownership, pointer, tunings
from laplace_dist.run.checkpoint import open_json
from laplace_dist.stages import decompose, evaluate, follow_on, resolving, tune, words
from laplace_dist.stages.rounds import Rounds
from laplace_dist.stages.search import Search


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
        report: Path or URL of the page that shows it, or None if there is none.
    """

    checkpoint: str
    version: str | None = None
    tuning: str | None = None
    metrics: dict[str, dict[str, float]] | None = None
    notes: tuple[str, ...] = ()
    helps: bool = True
    report: str | None = None


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
        if job.is_recalibrated():
            return _as_it_is(job, version)
        return _follow_on(job, version, tuning=not config.skip_tune, evaluation=not config.skip_evaluate)


def tune_posterior(config: Config, executor: ExecutorType | None = None) -> Result:
    """Tune the prior precision of a run's current posterior; arguments and errors as of `fit`."""
    with Job(config, executor, "tune") as job:
        return _follow_on(job, job.current_version(), tuning=True, evaluation=False)


def evaluate_posterior(config: Config, executor: ExecutorType | None = None) -> Result:
    """Evaluate a run's current posterior with the tuning in force; arguments and errors as of `fit`."""
    with Job(config, executor, "evaluate") as job:
        return _follow_on(job, job.current_version(), tuning=False, evaluation=True)


def _follow_on(job: Job, version: str, *, tuning: bool, evaluation: bool) -> Result:
    key = job.tune(version) if tuning else pointer.read_current(job.store)["tuning"]
    metrics = job.evaluate(version, key) if evaluation else None
    return _result(job, version, key, metrics, job.report(evaluations.shown(job.store) if evaluation else None))


def _result(job: Job, version: str, key: str | None, metrics: dict[str, Any] | None, page: str | None) -> Result:
    untuned = {"sigma_noise": 1.0 if likelihood_of(job.config.likelihood).has_noise else None}
    tuned = untuned if key is None else tunings.read_tuning(job.store, key)[0]
    return Result(job.store.url, version, key, metrics, tuple(tunings.notes(tuned)), tunings.helps(tuned), page)


def _as_it_is(job: Job, version: str) -> Result:
    """Leave tuning and metrics of a posterior alone that a recalibration has accepted: others were compared with nothing."""
    job.say(
        "so do its tuning and its metrics: jobs/tune.py and jobs/evaluate.py change them, jobs/recalibrate.py adds data"
    )
    key, shown = pointer.read_current(job.store)["tuning"], evaluations.shown(job.store)
    sealed = None if shown is None else open_json(job.store.read(shown), shown)
    ours = sealed is not None and shown.startswith(f"evaluation/{version}-") and sealed["settings"].get("tuning") == key
    return _result(job, version, key, sealed["metrics"] if ours else None, job.report())


class Job(FitStages):
    """The stages of a job: those of a fit, and those that follow on it."""

    _told = ""  # of the last tuning

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
        if config.searches:
            self._splits("val")  # refused, if it cannot be had, before anything is tuned
        if not config.searches_prior and config.recalibrate != "temperature":
            self._choose(
                version, None, start := layout.tuning_key(version, tune.settings(config, None, self.device_type))
            )
        if not config.searches:
            return self._against_map(version, start)
        found = self._fingerprint("val")
        start = None if config.searches_prior else tunings.start_of(self.store, start or pointer.tuning_of(self.store))
        chosen = tune.settings(config, found, self.device_type, start)
        key = layout.tuning_key(version, chosen)
        self._choose(version, self._search(version, key, chosen, config, start), key)
        return key

    def _against_map(self, version: str, evidence: str) -> str:
        """Compare what the evidence has chosen with MAP where there is a validation split; returns the key of what is kept."""
        config, why = self.config, self._why_no_validation()
        if why:
            self.say(
                f"tune: the evidence has chosen, and nothing was compared with MAP, since there is no val split: {why}"
            )
            return evidence
        chosen = tune.settings_of_comparison(config, self._fingerprint("val"), self.device_type, evidence)
        key = layout.tuning_key(version, chosen)
        given = config.model_copy(
            update={"tune_method": "gridsearch", "prior_structure": "scalar", "recalibrate": "prior"}
        )
        search = self._search(version, key, chosen, given, evidence)
        self._choose(version, search, key, search.compare)
        return key

    def _search(self, version: str, key: str, chosen: dict[str, Any], config: Config, start: str | None) -> Search:
        """Return a search on the validation split that has scored nothing yet; see `Rounds` for what it is given."""
        shards = plan_shards(len(self._splits("val")["val"]), config.batch_size)
        return Search(Rounds(self.store, self.plan, version, key, chosen, config, shards, start, self._tune))

    def _why_no_validation(self) -> str:
        """Say why there is no validation split that can be scored; empty where there is one, which is then loaded."""
        try:
            splits = {"val": self._loaded.get("val") or sources.load_split(self.config, "val")}
            follow_on.check_again(self.config, self.store, self.plan, splits)
        except StorageError:
            raise
        except SettingsError as error:
            return str(error)
        except Exception as error:  # of the user's own code, which need not know of a split that nobody has asked for
            return f"{type(error).__name__}: {error}"
        self._loaded |= splits
        return ""

    def _choose(self, version: str, search: Search | None, key: str, how: Callable[[], Task] | None = None) -> None:
        """Commit a tuning, by a search or by the evidence, if that is not done yet, and say what it is.

        Args:
            version: The posterior version.
            search: The search; None for the evidence.
            key: Of the tuning.
            how: What returns the task that commits it; `search.choose` if not given.
        """
        if not ownership.has(self.store, self.plan, key):
            if search is not None:
                self.decompose(version)
                task: Task = (how or search.choose)()
            else:
                chosen = tune.settings(self.config, None, self.device_type)
                task = tune.MaximizeEvidence(self.plan.digest, version, key, chosen)
            self._tune([task], "results", 1, 0)
        manifest, value = tunings.read_tuning(self.store, key)
        method, temperature = tunings.method_of(manifest), manifest.get("logit_temperature") or 1.0
        text = f"tune: {words.chosen(value, manifest['sigma_noise'], temperature, method)}"
        if text != self._told:  # what the evidence has chosen is said before it is compared with MAP, which may keep it
            self.say(text)
        self._told = text
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
        if unused := [name for name in config.ood if name not in splits]:
            self.say(
                f"evaluate: --ood {' '.join(unused)} is passed over: a prediction of {config.likelihood} has no confidence "
                "that would tell examples in distribution from others"
            )
        found = {name: self._fingerprint(name) for name in splits}
        groups = groups_of(splits["test"], "test")
        chosen = evaluate.settings(config, tuning, found, self.device_type, groups)
        key = layout.evaluation_key(version, chosen)
        if not ownership.has(self.store, self.plan, key):
            shards = [(name, s) for name, split in splits.items() for s in plan_shards(len(split), config.batch_size)]
            if self.plan.posterior_spec["structure"] == "kron":  # a dense precision has a root that costs less
                self.decompose(version)
            tasks, done = evaluate.shard_tasks(self.store, self.plan, version, tuning, key, found, shards, groups)
            self._run(tasks, Progress("evaluate", "shards", len(shards), done))
            ids = {name: [s.id for other, s in shards if other == name] for name in splits}
            summary = evaluate.Summarize(self.plan.digest, key, chosen, ids)
            self._run([summary], Progress("evaluate", "results", 1))
        return key

    def _splits(self, *names: str) -> dict[str, Any]:
        """Return splits, each loaded once; those of a follow-on job are looked at before anything starts, as a fit's are."""
        new = {name: sources.load_split(self.config, name) for name in names if name not in self._loaded}
        if new and not self._checked:
            follow_on.check_again(self.config, self.store, self.plan, new)
        self._loaded |= new
        return {name: self._loaded[name] for name in names}

    def _fingerprint(self, split: str) -> dict[str, Any]:
        """Return the fingerprint of a split, which is taken once."""
        if split not in self._prints:
            self._prints[split] = resolving.fingerprint(self.config, self._splits(split)[split], split)
        return self._prints[split]
