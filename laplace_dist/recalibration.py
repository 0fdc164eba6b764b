"""A recalibration from settings to decision: the order of the stages, and nothing else.

A window of new data is mapped and reduced, the chosen windows make a candidate, its prior is tuned on fresh validation data,
and candidate and current posterior are compared on the same fresh examples. Promoted is what is shown to be no worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from laplace_dist.config import gates
from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError, listed
from laplace_dist.execution.session import ExecutorType
from laplace_dist.job import Job
from laplace_dist.plan.segments import plan_shards
from laplace_dist.report import alert
from laplace_dist.report.progress import Progress
from laplace_dist.run import (
    evaluations,
    layout,
    monitoring,
    ownership,
    pointer,
    recalibrations,
    retention,
    versions,
    windows,
)
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import Term, Window, choose, chosen_names, is_rule, terms_of, windows_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages import drift, opening
from laplace_dist.stages import recalibrate as stage


@dataclass(frozen=True)
class Recalibration:
    """What a recalibration has found.

    Attributes:
        checkpoint: Directory or URL of the run.
        version: The candidate.
        promoted: Whether it is current now.
        why: The figure that decided, with its interval.
        metrics: Those of `map`, `current` and `candidate` by name, on the same fresh examples.
        report: Path or URL of the page that shows it, or None if it was not written anew.
        noticed: What has drifted since the current posterior was accepted: see the record under `drift`.
    """

    checkpoint: str
    version: str
    promoted: bool
    why: str
    metrics: dict[str, dict[str, float]]
    report: str | None = None
    noticed: tuple[str, ...] = ()


def recalibrate(
    config: Config, executor: ExecutorType | None = None, *, drop_window: str | None = None, dry_run: bool = False
) -> Recalibration | None:
    """Add a window of data to a run, and promote the posterior that it makes if that is shown to be no worse.

    Args:
        config: The settings; the data's `train` split is the new window, `val` and `test` are fresh.
        executor: Where the tasks are carried out, such as `Inline`; what `--ray-address` says if not given.
        drop_window: Add nothing, and leave this window out: exact unlearning.
        dry_run: Decide, and promote nothing.

    Returns:
        What was found; None if another job is at it.

    Raises:
        SettingsError: The settings or the state are refused; the current posterior stays.
        RunFailed: The run cannot go on; everything committed is kept, and the current posterior stays.
        CheckpointError: An object of the checkpoint is missing, truncated or altered.
    """
    if config.fresh:
        raise SettingsError("--fresh: a recalibration adds to a run; only a fit begins one anew")
    with RecalibrationJob(config, executor) as job:
        if not job.take():
            return None
        job.begin(drop_window)
        terms = job.terms(drop_window)
        name = f"without-{drop_window}" if drop_window else job.window.name
        found = job.decided(name, terms)
        if found is None:
            version = job.combine(terms)
            tuning = None if config.skip_tune else job.choose_prior(version)
            found = job.decide(name, terms, version, tuning, dry_run=dry_run)
        if not dry_run:
            job.collect(found)
        return replace(job.result(found), report=None if dry_run else job.report())


def rollback(url: str, version: str, *, storage_options: dict[str, Any] | None = None) -> None:
    """Make a posterior version current again that was so before.

    Raises:
        SettingsError: The version is not in the history, or was collected; or another job has changed what is current at this
            moment.
    """
    store = Checkpoint(url, storage_options)
    pointer.roll_back(store, read_plan(store), version)


class RecalibrationJob(Job):
    """The stages of a recalibration over one run."""

    window: Window | None = None
    _left_out: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.kind = "recalibrate"
        if self.given.window is None:
            self.given = self.given.model_copy(update={"window": datetime.now(UTC).date().isoformat()})
        super().__post_init__()

    def take(self) -> bool:
        """Become the one job that recalibrates the run; False, with a line, if another one that lives is at it."""
        self.current_version()
        self._before = self.store.read(layout.CURRENT)
        self._current = open_json(self._before, layout.CURRENT)
        self.session.lease.show()
        holder = recalibrations.take(self.store, self.session.lease.job)
        if holder is not None:
            self.say(f"another recalibration of {self.store.url} is at work on {holder}; nothing to do")
        return holder is None

    def begin(self, drop_window: str | None) -> None:
        """Begin or continue the window, and see to it that its sum is committed."""
        if self.config.alert_cmd is not None:
            alert.arguments(self.config.alert_cmd)
        self._left_out = pointer.left_out(self._current)
        if drop_window is not None:
            return
        there = windows_of(self.store, self.plan)
        names = [window.name for window in there]
        self._chosen([*names, *({self.config.window} - set(names))])  # before anything is computed
        if self.config.window not in names and recalibrations.read_decision(self.store, self.plan, self.config.window):
            raise SettingsError(
                f"--window: got {self.config.window!r}, which was decided before and whose sum is gone (--keep-versions). Give "
                "new data a name of their own."
            )
        self.window, self._continued = opening.begin_window(self.config, self.store, there, self.device_type)
        self._checked = True
        self.say(f"{'continuing' if self._continued else 'adding'} window {self.window.name} of {self.store.url}")
        if windows.find_window(self.window.store, self.window.plan) is None:
            self.map()
            self.sum_window()
        if not self.config.keep_partials and self.window.store.list("partials"):
            windows.check_arrays(self.window.store, windows.read_window(self.window.store, self.window.plan))
            self.window.store.delete_tree("partials")

    def _chosen(self, there: Sequence[str]) -> list[str]:
        """Return the names of the windows that `--windows` means: those that were dropped are in only if they are named."""
        staying = [name for name in there if name not in self._left_out]
        return chosen_names(staying if is_rule(self.config.windows) else there, self.config.windows)

    def terms(self, drop_window: str | None) -> list[Term]:
        """Return the windows that the candidate is made of, with their weights."""
        there = windows_of(self.store, self.plan)
        names = [window.name for window in there]
        if drop_window is not None:
            if drop_window not in names or len(names) == 1:
                raise SettingsError(
                    f"--drop-window: got {drop_window!r}; expected one of several windows, and the run has "
                    f"{', '.join(names)}"
                )
            self._left_out = [*(name for name in self._left_out if name != drop_window), drop_window]
        chosen = self._chosen([name for name in names if name != drop_window])
        if not chosen:
            raise SettingsError(
                f"--windows: got {self.config.windows!r}, and every window there is was dropped; name some"
            )
        self._left_out = [name for name in self._left_out if name not in chosen]
        return terms_of(choose(there, ",".join(chosen), self.config.decay))

    def combine(self, terms: Sequence[Term]) -> str:
        """Commit the posterior version that windows make; one that was never current and lost its arrays is made again."""
        version = versions.version_of(terms)
        if all(entry["version"] != version for entry in pointer.history_of(self._current)):
            versions.discard_torn(self.store, self.plan, version)
        return super().combine(terms)

    def decided(self, name: str, terms: Sequence[Term]) -> dict[str, Any] | None:
        """Return what was found before, if the same was asked then and the current posterior is still what that left."""
        found = recalibrations.read_decision(self.store, self.plan, name)
        if (
            found is None
            or found["windows"] != stage.weights_of(terms)
            or found["settings"] != stage.settings(self.config)
        ):
            return None
        current, side = self._current, found["candidate" if found["promoted"] else "current"]
        there = ownership.has(self.store, self.plan, layout.version_key(current["version"]))
        if (current["version"], current["tuning"]) != (side["version"], side["tuning"]) or not there:
            return None
        self.say(f"{name} was decided before: nothing to do")
        return found

    def decide(
        self, name: str, terms: Sequence[Term], version: str, tuning: str | None, *, dry_run: bool
    ) -> dict[str, Any]:
        """Compare the candidate with the current posterior on fresh data, and promote it if it is shown to be no worse."""
        current = self._current
        sides = {
            side: {"version": v, "tuning": t, "evaluation": self.score(v, t)}
            for side, v, t in (("candidate", version, tuning), ("current", current["version"], current["tuning"]))
        }
        config, splits = self.config, self._splits("test")
        shards = tuple(shard.id for shard in plan_shards(len(splits["test"]), config.batch_size))
        keys = [sides[name]["evaluation"] for name in ("candidate", "current")]
        task = stage.Compare(self.plan.digest, *keys, shards, config.draws, config.level, config.seed)
        (receipt,) = self._run([task], Progress("recalibrate", "comparisons", 1), keep=True)
        margins = {"nll": config.margin_nll, "ece": config.margin_ece}
        better, why = stage.decide(receipt["differences"], margins)
        metrics = stage.metrics_of(self.store, sides)
        passed = gates.check(config.gate, metrics["candidate"], metrics["current"])
        if better and (failed := gates.why_not(passed)):
            better, why = False, failed
        watched = self.watch(name, sides["current"], dry_run=dry_run)
        promoted = better and not dry_run and self._promote(version, tuning, why, sides["candidate"]["evaluation"])
        found = {
            "windows": stage.weights_of(terms),
            **sides,
            "settings": stage.settings(config),
            "differences": {name: {**d, "margin": margins[name]} for name, d in receipt["differences"].items()},
            "metrics": metrics,
            "gates": passed,
            "drift": watched,
            "promoted": promoted,
            "why": f"{why}; not promoted, since this is a dry run" if better and dry_run else why,
            "environment": receipt["environment"],
        }
        if promoted:
            shown = {"map": metrics["map"], "laplace": metrics["candidate"]}
            self.store.replace(layout.METRICS, evaluations.metrics_json(version, tuning, shown))
        if not dry_run:
            if watched["noticed"] and config.alert_cmd is not None:
                alert.send(config.alert_cmd, {"checkpoint": self.store.url, "window": name, **found}, self.say)
            recalibrations.write_decision(self.store, self.plan, name, found)
        return found

    def watch(self, name: str, current: Mapping[str, Any], *, dry_run: bool) -> dict[str, Any]:
        """Look whether the fresh data are still like those on which the current posterior was accepted; returns the record.

        A window is looked at once, whatever comes between, since a look that is counted twice is no evidence.
        """
        config, before = self.config, self._current
        accepted = monitoring.evaluation_of(self.store, self.plan, before)
        kept = monitoring.read_state(self.store, self.plan)
        state = monitoring.reference(kept, before, accepted, current["evaluation"])
        if (last := state["last"]) and (last["name"], last["evaluation"]) == (name, current["evaluation"]):
            return last["record"]
        fresh = state, current["evaluation"], config.unlabelled, config.draws, config.level, config.seed
        tasks: list[Any] = [drift.MeasureDrift(self.plan.digest, *fresh)]
        if self.window is not None:
            n_data = versions.read_version(self.store, self.plan, current["version"])["n_data"]
            tasks.append(drift.CompareSpectra(self.plan.digest, current["version"], n_data))
        receipts = self._run(tasks, Progress("drift", "comparisons", len(tasks)), keep=True, alike=False)
        new = drift.looked(state, name, current["evaluation"], receipts)
        for stream, at in new["noticed"].items():
            if at == name:
                self.say(f"drift: {stream} is not what it was when the current posterior was accepted")
        if not dry_run:
            monitoring.write_state(self.store, self.plan, new)
        return new["last"]["record"]

    def collect(self, found: Mapping[str, Any]) -> None:
        """Delete what is kept for nothing, if the settings say what to keep."""
        if self.config.keep_versions is None:
            return
        sides, job = [found["candidate"], found["current"]], self.session.lease.job
        how = {"keep": self.config.keep_versions, "chosen": self.config.windows, "say": self.say}
        if gone := retention.collect(self.store, self.plan, job, sides=sides, **how):
            self.say(f"collected {listed(gone)}")

    def _promote(self, version: str, tuning: str | None, why: str, evaluation: str | None = None) -> bool:
        if not recalibrations.holds(self.store, self.session.lease.job):
            raise SettingsError(f"another recalibration of {self.store.url} has taken over. Nothing was promoted.")
        beside = {"evaluation": evaluation, "left_out": self._left_out}
        if not pointer.promote(self.store, self.plan, self._before, version, tuning, why, **beside):
            now = pointer.read_current(self.store)["version"]
            raise SettingsError(
                f"another job has made version {now} current at {self.store.url} meanwhile, so that the comparison with the "
                "one before says nothing. Nothing was promoted: run the same command again."
            )
        return True

    def result(self, found: Mapping[str, Any]) -> Recalibration:
        """Return what was found as callers get it."""
        noticed = tuple((found.get("drift") or {}).get("noticed", ()))
        version = found["candidate"]["version"]
        return Recalibration(
            self.store.url, version, found["promoted"], found["why"], found["metrics"], noticed=noticed
        )
