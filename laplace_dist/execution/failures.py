"""What a failure means, and how often a task, a start of a worker, or a whole run may fail."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from laplace_dist.errors import CheckpointError, RunFailed, StorageError
from laplace_dist.execution.tasks import Task

SAME_FAILURE = 3  # a task with the same failure as often as this is set aside: the others go on without it
ANY_FAILURE = 6  # or with failures of any kind
START_FAILURES = 8  # starts of workers that fail with no task finished in between stop the run
SET_ASIDE = 10  # tasks set aside that stop the run, since then it is not a few examples that are bad

LESS_MEMORY = (
    "Run fewer workers at once (--num-workers) or on larger nodes; a smaller --batch-size, --subset-of-weights last_layer "
    "or another --hessian-structure needs less memory too, but is another run: give a new --checkpoint, or --fresh"
)
_OUT_OF_MEMORY = re.compile(r"MemoryError|out of memory|(can't|cannot) allocate memory|bad_alloc", re.IGNORECASE)


def lasts(error: Exception) -> bool:
    """Say whether an error of a task would come again wherever it ran, so that it stops the run."""
    return isinstance(error, (ValueError, CheckpointError, RunFailed)) and not isinstance(error, StorageError)


def why_it_failed(error: Exception) -> str:
    """Return an error that a task raised as a phrase, with what to lower if its worker ran out of memory."""
    text = f"{type(error).__name__}: {error}"
    return f"{text.rstrip('.')}. The worker ran out of memory. {LESS_MEMORY}" if _OUT_OF_MEMORY.search(text) else text


@dataclass
class Budget:
    """Counts failures and decides when to stop trying a task, or all of them.

    A task that fails every time is set aside, so that one bad example costs no more than its segment: the others are
    finished first, and what was set aside fails the run at its end.

    Attributes:
        without_progress: Failures in a row, over all tasks and workers, with no task finished in between.
        set_aside: What became of the tasks that are tried no more, one sentence each.
    """

    without_progress: int
    set_aside: list[str] = field(default_factory=list)
    _by_task: dict[str, Counter[str]] = field(default_factory=dict)
    _in_a_row: int = 0

    def success(self, task: Task) -> None:
        """Record a finished task."""
        self._in_a_row = 0
        self._by_task.pop(task.what, None)
        self._by_task.pop(START, None)

    def failure(self, task: Task | None, why: str) -> bool:
        """Record a failure; returns whether the task is to be tried again.

        Raises:
            RunFailed: A budget of the whole run is spent.
        """
        self._in_a_row += 1
        what = task.what if task is not None else START
        seen = self._by_task.setdefault(what, Counter())
        kind = re.sub(r"\w*\d\w*", "#", why)  # attempt ids, addresses and times differ where the failure is the same
        seen[kind] += 1
        # Nodes may come and go while workers start, and the pool waits longer from start to start.
        same, any_ = (SAME_FAILURE, ANY_FAILURE) if task is not None else (START_FAILURES, START_FAILURES)
        spent = seen[kind] >= same or seen.total() >= any_
        if spent:
            times = seen[kind] if seen[kind] >= same else seen.total()
            self.set_aside.append(f"{what} failed {times} times, the last time because {why}")
            if task is None or len(self.set_aside) >= SET_ASIDE:
                self.check()
        if self._in_a_row >= self.without_progress:
            last = f"{self._in_a_row} failures in a row with nothing finished in between; the last one: {what}: {why}"
            raise RunFailed(_sentences([*self.set_aside, last]))
        return not spent

    def check(self) -> None:
        """Fail if a task was set aside.

        Raises:
            RunFailed: Naming each of them.
        """
        if self.set_aside:
            raise RunFailed(_sentences(self.set_aside))


START = "starting a worker"


def _sentences(causes: list[str]) -> str:
    text = "\n".join(f"{cause.rstrip('.')}." for cause in causes)
    return f"{text}{' ' if len(causes) == 1 else chr(10)}{_REMEDY}"


_REMEDY = "Everything committed so far is kept: remove the cause and run the same command again."
