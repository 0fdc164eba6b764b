"""A recalibration from settings to decision: the order of the stages, and nothing else.

A window of new data is mapped and reduced, the chosen windows make a candidate, its prior is tuned on fresh validation data,
and candidate and current posterior are compared on the same fresh examples. The candidate is promoted if it is shown to be no
worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.execution.session import ExecutorType
from laplace_dist.job import Job
from laplace_dist.plan.segments import plan_shards
from laplace_dist.report.progress import Progress
from laplace_dist.run import layout, pointer, recalibrations, windows
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import Term, choose, chosen_names, terms_of, windows_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages import opening
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
    """

    checkpoint: str
    version: str
    promoted: bool
    why: str
    metrics: dict[str, dict[str, float]]


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
        if (done := job.decided(name, terms)) is not None:
            return done
        version = job.combine(terms)
        tuning = None if config.skip_tune else job.choose_prior(version)
        return job.decide(name, terms, version, tuning, dry_run=dry_run)


def rollback(url: str, version: str, *, storage_options: dict[str, Any] | None = None) -> None:
    """Make a posterior version current again that was so before.

    Raises:
        SettingsError: The version is not in the history; or another job has changed what is current at this moment.
    """
    store = Checkpoint(url, storage_options)
    plan, content = read_plan(store), store.read(layout.CURRENT)
    history = open_json(content, layout.CURRENT).get("history") or []
    found = [entry for entry in history if entry["version"] == version]
    if not found:
        known = ", ".join(dict.fromkeys(entry["version"] for entry in history)) or "none"
        raise SettingsError(
            f"--rollback: got {version!r}, which was never current at {url!r}; versions that were: {known}"
        )
    if not pointer.promote(store, plan, content, version, found[-1]["tuning"], "rolled back"):
        raise SettingsError(
            f"--rollback: another job has changed what is current at {url!r} at this moment. Look again."
        )


class RecalibrationJob(Job):
    """The stages of a recalibration over one run."""

    def __post_init__(self) -> None:
        if self.given.window is None:
            self.given = self.given.model_copy(update={"window": datetime.now(UTC).date().isoformat()})
        super().__post_init__()

    def take(self) -> bool:
        """Become the one job that recalibrates the run; False, with a line, if another one that lives is at it."""
        self.current_version()
        self._before = self.store.read(layout.CURRENT)
        self.session.lease.show()
        holder = recalibrations.take(self.store, self.session.lease.job)
        if holder is not None:
            self.say(f"another recalibration of {self.store.url} is at work on {holder}; nothing to do")
        return holder is None

    def begin(self, drop_window: str | None) -> None:
        """Begin or continue the window, and see to it that its sum is committed."""
        if drop_window is not None:
            return
        there = windows_of(self.store, self.plan)
        names = [window.name for window in there]
        chosen_names([*names, *({self.config.window} - set(names))], self.config.windows)  # before anything is computed
        self.window, self._continued = opening.begin_window(self.config, self.store, there, self.device_type)
        self.say(f"{'continuing' if self._continued else 'adding'} window {self.window.name} of {self.store.url}")
        if windows.find_window(self.window.store, self.window.plan) is None:
            self.map()
            self.sum_window()
        if not self.config.keep_partials:
            self.window.store.delete_tree("partials")

    def terms(self, drop_window: str | None) -> list[Term]:
        """Return the windows that the candidate is made of, with their weights."""
        there = windows_of(self.store, self.plan)
        if drop_window is None:
            return terms_of(choose(there, self.config.windows, self.config.decay))
        names = [window.name for window in there]
        if drop_window not in names or len(names) == 1:
            raise SettingsError(
                f"--drop-window: got {drop_window!r}; expected one of several windows, and the run has {', '.join(names)}"
            )
        left = ",".join(name for name in names if name != drop_window)
        return terms_of(choose(there, left, self.config.decay))

    def decided(self, name: str, terms: Sequence[Term]) -> Recalibration | None:
        """Return what was found before, if the same was asked then and the current posterior is still what that left."""
        found = recalibrations.read_decision(self.store, self.plan, name)
        if (
            found is None
            or found["windows"] != stage.weights_of(terms)
            or found["settings"] != stage.settings(self.config)
        ):
            return None
        current = open_json(self._before, layout.CURRENT)
        side = found["candidate" if found["promoted"] else "current"]
        if (current["version"], current["tuning"]) != (side["version"], side["tuning"]):
            return None
        self.say(f"{name} was decided before: nothing to do")
        return self._result(found)

    def decide(
        self, name: str, terms: Sequence[Term], version: str, tuning: str | None, *, dry_run: bool
    ) -> Recalibration:
        """Compare the candidate with the current posterior on fresh data, and promote it if it is shown to be no worse."""
        current = open_json(self._before, layout.CURRENT)
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
        promoted = better and not dry_run and self._promote(version, tuning, why)
        found = {
            "windows": stage.weights_of(terms),
            **sides,
            "settings": stage.settings(config),
            "differences": {name: {**d, "margin": margins[name]} for name, d in receipt["differences"].items()},
            "metrics": self._metrics(sides),
            "promoted": promoted,
            "why": why
            if promoted or not better
            else f"{why}; not promoted, since this is a dry run"
            if dry_run
            else why,
            "environment": receipt["environment"],
        }
        if not dry_run:
            recalibrations.write_decision(self.store, self.plan, name, found)
        return self._result(found)

    def _promote(self, version: str, tuning: str | None, why: str) -> bool:
        if not recalibrations.holds(self.store, self.session.lease.job):
            raise SettingsError(f"another recalibration of {self.store.url} has taken over. Nothing was promoted.")
        if not pointer.promote(self.store, self.plan, self._before, version, tuning, why):
            now = pointer.read_current(self.store)["version"]
            raise SettingsError(
                f"another job has made version {now} current at {self.store.url} meanwhile, so that the comparison with the "
                "one before says nothing. Nothing was promoted: run the same command again."
            )
        return True

    def _metrics(self, sides: dict[str, Any]) -> dict[str, dict[str, float]]:
        found = {
            name: open_json(self.store.read(s["evaluation"]), s["evaluation"])["metrics"] for name, s in sides.items()
        }
        own = {name: metrics["laplace"] for name, metrics in found.items()}
        return {"map": found["candidate"]["map"], "current": own["current"], "candidate": own["candidate"]}

    def _result(self, found: dict[str, Any]) -> Recalibration:
        version = found["candidate"]["version"]
        return Recalibration(self.store.url, version, found["promoted"], found["why"], found["metrics"])
