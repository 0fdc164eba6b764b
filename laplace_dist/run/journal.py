"""What a job has done and how far it is, kept under the checkpoint for whoever looks, and for the report.

The driver writes one small object per job, now and then and at the end. Nothing depends on it: losing it harms nothing, and a
storage that does not answer just now is no reason to stop.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import STATUS, status_key
from laplace_dist.run.provenance import node
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

EVERY = 10.0  # seconds between two writes
SAMPLES = 240  # of the number of workers; if there are more, every second one is dropped
KEPT = 100  # records of jobs; older ones are deleted


class Journal:
    """The record of one job.

    Args:
        store: The checkpoint.
        job: `fit`, `tune`, `evaluate` or `recalibrate`.
        window: Name of the window that it works on, if it names one.
        clock: Returns seconds.
    """

    def __init__(
        self, store: Store, job: str, window: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._clock = store, clock
        self._begun = self._shown = clock()
        self._every, self._next_sample = 1.0, 0.0
        began = datetime.now(UTC)
        self._key = status_key(f"{began:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}")
        self._values: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "job": job,
            "window": window,
            "node": node(),
            "begun": began.isoformat(timespec="seconds"),
            "state": "at work",
            "why": None,
            "stages": [],
            "workers": [],
        }

    def stage(self, plan: str, stage: str, unit: str, total: int, done: int) -> StageRecord:
        """Begin a stage.

        Args:
            plan: Digest of the run's plan.
            stage: Its name, such as `map`.
            unit: What is counted.
            total: How many there are in all.
            done: How many were there before.
        """
        self._values["plan"] = plan
        values = {"stage": stage, "unit": unit, "total": total, "before": done, "done": done}
        counts = {"examples": 0, "bytes": 0, "retries": 0, "lost": 0, "busy": 0, "seconds": 0.0}
        self._values["stages"].append(values | counts)
        if len(self._values["stages"]) == 1:
            self.write()
        return StageRecord(self, self._values["stages"][-1])

    @property
    def has_begun(self) -> bool:
        """Whether there was a stage, so that there is something to show."""
        return "plan" in self._values

    @property
    def seconds(self) -> float:
        """Seconds since the job began."""
        return self._clock() - self._begun

    def sample(self, alive: int) -> None:
        """Note how many workers live, and write if that was not done for a while."""
        samples = self._values["workers"]
        if self.seconds >= self._next_sample:
            samples.append([round(self.seconds, 1), alive])
            self._next_sample = self.seconds + self._every
        if len(samples) > SAMPLES:
            del samples[1::2]
            self._every *= 2
        if self._clock() - self._shown >= EVERY:
            self.write()

    def write(self, state: str = "at work") -> None:
        """Write the record, if a stage has begun.

        Args:
            state: What it says of the job.
        """
        if not self.has_begun:
            return
        self._values["state"] = state
        self._shown = self._clock()
        values = {**self._values, "seconds": round(self.seconds, 3)}
        try:
            self._store.replace(self._key, seal_json(values))
        except (CheckpointError, RunFailed, SettingsError):  # the job itself meets whatever is wrong, if it matters
            return

    def end(self, error: BaseException | None) -> None:
        """Write how the job ended, and delete the oldest records if there are too many.

        Args:
            error: What ended it, or None.
        """
        if not self.has_begun:
            return
        ended = "failed" if isinstance(error, Exception) else "interrupted"
        self._values["why"] = str(error).splitlines()[0][:500] if isinstance(error, Exception) and str(error) else None
        self.write("done" if error is None else ended)
        try:
            for key in self._store.list(STATUS, recursive=False)[:-KEPT]:
                self._store.delete_tree(key)
        except (CheckpointError, SettingsError):
            return


class StageRecord:
    """One stage in a job's record; hears what `report.progress.Progress` hears.

    Args:
        journal: The job's record.
        values: Of the stage, which are changed in place.
    """

    def __init__(self, journal: Journal, values: dict[str, Any]) -> None:
        self._journal, self._values = journal, values
        self._begun = journal.seconds

    def done(self, examples: int, stored: int = 0) -> None:
        """Count one task, the examples that it held and the bytes that it stored."""
        self._values["done"] += 1
        self._values["examples"] += examples
        self._values["bytes"] += stored

    def failed(self, lost: bool) -> None:
        """Count a failure: the loss of its node, or one that says something of the task."""
        self._values["lost" if lost else "retries"] += 1

    def tick(self, busy: int, oldest: str, alive: int) -> None:
        """Hear about once a second how many tasks are in flight and how many workers live."""
        self._values["busy"] = busy
        self._values["seconds"] = round(self._journal.seconds - self._begun, 3)
        self._journal.sample(alive)

    def close(self) -> None:
        """End the stage."""
        self._values["busy"] = 0
        self._values["seconds"] = round(self._journal.seconds - self._begun, 3)


def records(store: Store, plan: Plan, newest: int = KEPT) -> list[dict[str, Any]]:
    """Return the records of the jobs of a run, the oldest first; one that is damaged or of another run is left out.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        newest: How many of them at most.
    """
    found = []
    for key in store.list(STATUS, recursive=False)[-newest:]:
        try:
            values = open_json(store.read(key), key)
        except (MissingObjectError, CheckpointError, SettingsError):
            continue
        if values["plan"] == plan.digest:
            found.append(values)
    return found
