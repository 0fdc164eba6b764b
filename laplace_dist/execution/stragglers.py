"""Attempts in flight, and which of them take so long that an idle worker had better begin the same task too.

A task's effect lies in the store, where the first commit counts: two attempts may both finish. A second one is worth it only
when nothing else is left to do, because then the run waits for the slowest node (speculative execution, Dean and Ghemawat,
"MapReduce", OSDI 2004).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from laplace_dist.execution.tasks import Event, Task
from laplace_dist.execution.timeouts import ENOUGH

# How often the median time of those that have finished: tasks of a stage are of one size, and nodes of one kind differ by less.
SLOWER = 1.5
# Attempts at once: a second one may be on a slow node as well.
MOST = 3
# And never less than so many seconds: a store that restarts keeps everyone waiting for some tens of them, and short tasks are
# over before a second attempt would be.
AT_LEAST_SECONDS = 60.0


@dataclass
class _Flight:
    task: Task
    last: float  # when the latest attempt was begun
    attempts: int = 1


@dataclass
class InFlight:
    """The tasks of a stage that have been begun and are not done.

    Attributes:
        alike: The tasks are of about one size, so that times can be compared.
    """

    alike: bool = True
    _flights: dict[str, _Flight] = field(default_factory=dict)
    _times: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def oldest(self) -> str:
        """The task that was begun first, in words."""
        return next(iter(self._flights), "")

    def begin(self, task: Task, now: float) -> None:
        """Record an attempt."""
        there = self._flights.get(task.what)
        if there is None:
            self._flights[task.what] = _Flight(task, now)
        else:
            there.attempts, there.last = there.attempts + 1, now

    def knows(self, event: Event) -> bool:
        """Say whether an event is about a task that is not done; that of another attempt, or of an earlier stage, is not."""
        there = self._flights.get(event.task.what)
        return there is not None and there.task == event.task

    def finished(self, event: Event) -> None:
        """Record that a task is done, whichever attempt it was."""
        del self._flights[event.task.what]
        insort(self._times, event.seconds)

    def failed(self, event: Event) -> bool:
        """Record that an attempt has failed; returns whether another one is still at work."""
        there = self._flights[event.task.what]
        there.attempts -= 1
        if not there.attempts:
            del self._flights[event.task.what]
        return there.attempts > 0

    def late(self, now: float) -> list[Task]:
        """Return the tasks whose latest attempt has taken so long that another one is worth it, the longest first."""
        if not self.alike or len(self._times) < ENOUGH:
            return []
        most = max(AT_LEAST_SECONDS, SLOWER * self._times[len(self._times) // 2])
        return [f.task for f in self._flights.values() if f.attempts < MOST and now - f.last > most]
