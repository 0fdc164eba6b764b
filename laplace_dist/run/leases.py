"""Which jobs are at work on a run: what they have written and will name later is no orphan.

A job creates one small object when its first stage begins, writes it again from time to time, and deletes it at its end. All
times are the storage's own, so that the clocks of machines do not matter.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime

from laplace_dist.errors import MissingObjectError, StorageError
from laplace_dist.plan.plan import FORMAT_VERSION
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import JOBS, lease_key
from laplace_dist.run.provenance import node
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

EVERY = 60.0  # seconds between two signs of life
GONE = 1.0  # hours without one after which a job counts as dead: longer than any outage that is waited for


class Lease:
    """The sign of life of one job.

    Args:
        store: The checkpoint.
        clock: Returns seconds.

    Attributes:
        job: Id of the job.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.job = uuid.uuid4().hex
        self._store, self._key = store, lease_key(self.job)
        self._begun: float | None = None
        self._shown = 0.0

    def show(self) -> None:
        """Say that the job is at work, if that was not said for a while."""
        now = self._clock()
        if self._begun is None:
            self._begun = now
        elif now - self._shown < EVERY:
            return
        self._shown = now
        hours = (now - self._begun) / 3600
        self._store.replace(self._key, seal_json({"format_version": FORMAT_VERSION, "node": node(), "hours": hours}))

    def forget(self) -> None:
        """Have the next call say it in any case: what was said is gone."""
        self._shown = float("-inf")

    def end(self) -> None:
        """Say that it is not any more; a storage that does not answer hides no other error, and the sign expires."""
        if self._begun is not None:
            with suppress(StorageError):
                self._store.delete_tree(self._key)


def hours_at_work(store: Store, times: Mapping[str, datetime]) -> float | None:
    """Return for how many hours the oldest job that is at work has been, counted from now; None if none is.

    Args:
        store: The checkpoint.
        times: When every object was last written.
    """
    keys = [key for key in times if key.startswith(f"{JOBS}/")]
    if not keys:
        return None
    now = store.now()
    alive = {key: (now - times[key]).total_seconds() / 3600 for key in keys}
    return max((silent + _hours(store, key) for key, silent in alive.items() if silent < GONE), default=None)


def _hours(store: Store, key: str) -> float:
    """Return for how long a job had been at work when it last said so; 0 if it has ended meanwhile."""
    try:
        return open_json(store.read(key), key)["hours"]
    except MissingObjectError:
        return 0.0


def others_at_work(store: Store, job: str) -> bool:
    """Say whether another job than this one has shown a sign of life within the last hour."""
    own = lease_key(job)
    return hours_at_work(store, {key: time for key, time in store.modified().items() if key != own}) is not None
