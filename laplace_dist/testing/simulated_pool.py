"""A pool of spot machines on a clock that is not the wall's: thousands of tasks and preemptions in a second."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Collection
from itertools import count

from laplace_dist.execution.tasks import Event, Task
from laplace_dist.execution.timeouts import Limit

SLOWNESS = 10  # of a straggler


class SimulatedPool:
    """Workers that take time, are preempted at random, and come back; it is what `run_tasks` needs of a pool.

    Every attempt at a task takes `seconds`. With probability `preempted` its node is lost at a moment drawn evenly from
    them, and a new worker is there after `start` seconds. Poisoned tasks kill their worker at once, on a node that lives on.

    Args:
        size: Number of workers.
        preempted: Probability that an attempt is preempted.
        seed: Of what is drawn.
        seconds: That an attempt takes.
        start: Seconds until a worker is there.
        poisoned: What the poisoned tasks are called.
        stragglers: Probability that an attempt takes ten times as long.

    Attributes:
        now: The time in seconds.
        worked: Seconds of work, with what was lost.
        attempts: How often each task was begun.
    """

    def __init__(
        self,
        size: int,
        preempted: float = 0.0,
        seed: int = 0,
        *,
        seconds: float = 60.0,
        start: float = 0.0,
        poisoned: Collection[str] = (),
        stragglers: float = 0.0,
    ) -> None:
        self.size, self.idle, self.busy = size, 0, 0
        self.now, self.worked, self.attempts = 0.0, 0.0, Counter()
        self._preempted, self._random = preempted, random.Random(seed)
        self._seconds, self._start, self._poisoned = seconds, start, poisoned
        self._stragglers, self._alive = stragglers, 0
        self._due: list[tuple[float, int, Event | None]] = []
        self._order = count()

    @property
    def ideal(self) -> float:
        """Seconds that the work done so far, with what was lost, takes at best: evenly shared, without a pause."""
        unfinished = sum(due - self.now for due, _, event in self._due if event is not None)
        return (self.worked - unfinished) / self.size

    @property
    def alive(self) -> int:
        """Number of workers."""
        return self._alive

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most `size`."""
        while self._alive < min(wanted, self.size):
            self._alive += 1
            self._later(self._start, None)

    def submit(self, task: Task) -> None:
        """Begin an attempt, and decide how it ends."""
        self.idle, self.busy = self.idle - 1, self.busy + 1
        self.attempts[task.what] += 1
        if task.what in self._poisoned:
            seconds, event = 0.0, Event(task, failure="the worker's process died", node="another")
        elif self._random.random() < self._preempted:
            seconds = self._random.random() * self._seconds
            event = Event(task, failure="its node was preempted", lost=True)
        else:
            slow = self._stragglers > 0 and self._random.random() < self._stragglers
            seconds = self._seconds * (SLOWNESS if slow else 1)
            event = Event(task, receipt={}, seconds=seconds)
        self.worked += seconds
        self._later(seconds, event)

    def wait(self, seconds: float, limit: Limit) -> list[Event]:
        """Move the clock to the next thing that happens, and return it; at most by so many seconds."""
        if self._due[0][0] > self.now + seconds:
            self.now += seconds
            return []
        self.now, _, event = heapq.heappop(self._due)
        if event is None:
            self.idle += 1
            return []
        self.busy -= 1
        if event.receipt is not None:
            self.idle += 1
        else:
            self._alive -= 1
        return [event]

    def close(self) -> None:
        """Do nothing: there is nothing."""

    def _later(self, seconds: float, event: Event | None) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), event))
