"""A recalibration from settings to decision: the order of the stages, and nothing else.

A window of new data is mapped and reduced, the chosen windows make a candidate, its prior is tuned on fresh validation data,
and candidate and current posterior are compared on the same fresh examples. Promoted is what is shown to be no worse.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from laplace_dist.config import gates
from laplace_dist.config.given import check_given
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError, listed
from laplace_dist.execution.session import ExecutorType
from laplace_dist.plan.segments import plan_shards
from laplace_dist.recalibration_windows import WindowStages
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
)
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import Term
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages import drift
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
        notes: Which noise or temperature the metrics are of.
    """

    checkpoint: str
    version: str
    promoted: bool
    why: str
    metrics: dict[str, dict[str, float]]
    report: str | None = None
    noticed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
        What was found; None if another job is at it, or the window was dropped before.

    Raises:
        SettingsError: The settings or the state are refused; the current posterior stays.
        RunFailed: The run cannot go on; everything committed is kept, and the current posterior stays.
        CheckpointError: An object of the checkpoint is missing, truncated or altered.
    """
    check_given(config, executor)
    if config.fresh:
        raise SettingsError("--fresh: a recalibration adds to a run; only a fit begins one anew")
    with RecalibrationJob(config, executor) as job:
        return job.carry_out(drop_window, dry_run=dry_run)


def rollback(url: str, version: str, *, storage_options: dict[str, Any] | None = None) -> None:
    """Make a posterior version current again that was so before.

    Raises:
        SettingsError: The version is not in the history, or was collected; or another job has changed what is current at this
            moment.
    """
    store = Checkpoint(url, storage_options)
    pointer.roll_back(store, read_plan(store), version)


class RecalibrationJob(WindowStages):
    """The stages of a recalibration over one run.

    Attributes:
        wait: Lets so many seconds pass, while it is to be seen whether another job lives.
    """

    wait = staticmethod(time.sleep)

    def __post_init__(self) -> None:
        self.kind = "recalibrate"
        if self.given.window is None:
            self.given = self.given.model_copy(update={"window": datetime.now(UTC).date().isoformat()})
        super().__post_init__()

    def carry_out(self, drop_window: str | None = None, *, dry_run: bool = False) -> Recalibration | None:
        """Do all of it; arguments and what is returned as of `recalibrate`."""
        if not self.take():
            return None
        if not dry_run:
            self.finish()
        self.begin(drop_window)
        terms = self.terms(drop_window)
        name = f"without-{drop_window}" if drop_window else self.window.name
        found = self.decided(name, terms)
        if found is None and self.is_out_already(drop_window, terms):
            return None
        if found is None:
            version = self.combine(terms)
            tuning = None if self.config.skip_tune else self.choose_prior(version)
            found = self.decide(name, terms, version, tuning, dry_run=dry_run)
        if not dry_run:
            self.drop_partials()
            self.collect(found)
        return replace(self.result(found), report=None if dry_run else self.report())

    def take(self) -> bool:
        """Become the one job that recalibrates the run; False, with a line, if another one that lives is at it.

        What is current counts from then on: before that, another one may still have promoted.
        """
        self.current_version()
        self.store.check_swaps()  # which the promotion needs, after all the work
        holder = recalibrations.take(self.store, self.session.lease, self.say, self.wait)
        if holder is not None:
            self.say(f"another recalibration of {self.store.url} is at work on {holder}; nothing to do")
            return False
        self._before = self.store.read(layout.CURRENT)
        self._current = open_json(self._before, layout.CURRENT)
        return True

    def decided(self, name: str, terms: Sequence[Term]) -> dict[str, Any] | None:
        """Return what was found before, if the same was asked then and the current posterior is still what that left."""
        found, current = recalibrations.read_decision(self.store, self.plan, name), self._current
        there = ownership.has(self.store, self.plan, layout.version_key(current["version"]))
        if found is None or not there or not stage.still_holds(found, terms, self.asked, current):
            return None
        self.say(f"{name} was decided before: nothing to do")
        return found

    def decide(
        self, name: str, terms: Sequence[Term], version: str, tuning: str | None, *, dry_run: bool
    ) -> dict[str, Any]:
        """Compare the candidate with the current posterior on fresh data, and promote it if it is shown to be no worse."""
        compared, better = self._compared(version, tuning)
        found = {"windows": stage.weights_of(terms), "passed_over": self._passed_over, **compared}
        found["drift"] = self.watch(name, found["current"], dry_run=dry_run)
        if better and dry_run:
            found["why"] += "; not promoted, since this is a dry run"
        if dry_run:
            return found
        side, current = found["candidate"], self._current
        now = current["version"], current["tuning"], pointer.left_out(current)
        if better and now == (side["version"], side["tuning"], list(self._left_out)):
            found |= {"promoted": True, "why": "it is what is current already; nothing was changed"}
        elif better:
            recalibrations.write_decision(self.store, self.plan, name, {**found, "pending": True})
            self._promote(name, found)
            found["promoted"] = True
        self.conclude(name, found)
        return found

    def _compared(self, version: str, tuning: str | None) -> tuple[dict[str, Any], bool]:
        """Return what a comparison of the candidate with the current posterior found, and whether it may take its place."""
        config, current = self.config, self._current
        sides = {
            side: {"version": v, "tuning": t, "evaluation": self.score(v, t)}
            for side, v, t in (("candidate", version, tuning), ("current", current["version"], current["tuning"]))
        }
        n = len(self._splits("test")["test"])
        shards = tuple(shard.id for shard in plan_shards(n, config.batch_size))
        keys = [side["evaluation"] for side in sides.values()]
        task = stage.Compare(self.plan.digest, *keys, shards, config.draws, config.level, config.seed)
        (receipt,) = self._run([task], Progress("recalibrate", "comparisons", 1), keep=True)
        margins = {"nll": config.margin_nll, "ece": config.margin_ece}
        better, why = stage.decide(receipt["differences"], margins, n, config.level)
        metrics = stage.metrics_of(self.store, sides)
        passed = gates.check(config.gate, metrics["candidate"], metrics["current"])
        if better and (failed := gates.why_not(passed)):
            better, why = False, failed
        if not better and self.dropping is not None:
            why += (
                f"; window {self.dropping} stays in, in the next candidates too. To drop it whatever the figures say: the same "
                "command with a --margin-nll and --margin-ece that allow it, and without --gate"
            )
        return {
            **sides,
            "settings": self.asked(),
            "differences": {name: {**d, "margin": margins[name]} for name, d in receipt["differences"].items()},
            "metrics": metrics,
            "gates": passed,
            "promoted": False,
            "why": why,
            "environment": receipt["environment"],
        }, better

    def conclude(self, name: str, found: Mapping[str, Any]) -> None:
        """Say to whom it concerns what was decided, and record it last: until then the same command does this again."""
        side = found["candidate"]
        if found["promoted"] and pointer.read_current(self.store)["version"] == side["version"]:
            shown = {"map": found["metrics"]["map"], "laplace": found["metrics"]["candidate"]}
            self.store.replace(layout.METRICS, evaluations.metrics_json(side["version"], side["tuning"], shown))
        if found["drift"]["noticed"] and self.config.alert_cmd is not None:
            self.tell({"checkpoint": self.store.url, "window": name, **found})
        recalibrations.write_decision(self.store, self.plan, name, found)

    def tell(self, record: Mapping[str, Any]) -> None:
        """Hand a record to the command of `--alert-cmd`."""
        alert.send(self.config.alert_cmd, record, self.say)

    def finish(self) -> None:
        """Do what a job has left undone that died after its promotion: the history says so, and its decision is pending."""
        last = [entry for entry in pointer.history_of(self._current) if entry.get("window")][-1:]
        found = recalibrations.read_decision(self.store, self.plan, last[0]["window"]) if last else None
        if found is None or not found.get("pending"):
            return
        side = found["candidate"]
        if (last[0]["version"], last[0].get("evaluation")) == (side["version"], side["evaluation"]):
            self.say(f"{found['window']} was promoted by a job that died then; what it has left undone is done now")
            done = {
                key: value for key, value in found.items() if key not in ("format_version", "plan", "window", "pending")
            }
            self.conclude(found["window"], {**done, "promoted": True})

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
        for text in drift.said(new["last"]["record"], name):
            self.say(text)
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

    def _promote(self, name: str, found: Mapping[str, Any]) -> None:
        if not recalibrations.holds(self.store, self.session.lease.job):
            raise SettingsError(f"another recalibration of {self.store.url} has taken over. Nothing was promoted.")
        side = found["candidate"]
        given = side["version"], side["tuning"], found["why"]
        beside = {"evaluation": side["evaluation"], "left_out": self._left_out, "window": name}
        if not pointer.promote(self.store, self.plan, self._before, *given, **beside):
            now = pointer.read_current(self.store)["version"]
            raise SettingsError(
                f"another job has made version {now} current at {self.store.url} meanwhile, so that the comparison with the "
                "one before says nothing. Nothing was promoted: run the same command again."
            )

    def result(self, found: Mapping[str, Any]) -> Recalibration:
        """Return what was found as callers get it."""
        noticed = tuple((found.get("drift") or {}).get("noticed", ()))
        version = found["candidate"]["version"]
        notes = stage.notes_of(self.store, found, likelihood_of(self.config.likelihood).has_noise)
        shown = found["promoted"], found["why"], found["metrics"]
        return Recalibration(self.store.url, version, *shown, noticed=noticed, notes=notes)
