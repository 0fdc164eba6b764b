"""A pool whose workers are actors of a schedule: they crash, are taken for hung, and outlive the driver that began them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from laplace_dist.execution.failures import event_of
from laplace_dist.execution.raised import Raised, outcome_of
from laplace_dist.execution.tasks import Event, Task
from laplace_dist.execution.timeouts import Limit
from laplace_dist.testing.schedule import Actor, Crash


class _Worker:
    """One worker; `heard` says whether the pool still listens to it."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.heard, self.closed = True, False
        self.actor: Actor | None = None


class ActorPool:
    """What `run_tasks` needs of a pool.

    Args:
        driver: Whose pool it is.
        size: Number of workers.
        begin: Returns the context in which a worker carries out tasks.
        hung: Probability, each time that the driver looks, that a worker at work is taken for hung. It goes on, unheard.
    """

    def __init__(self, driver: Actor, size: int, begin: Callable[[Actor], Any], hung: float = 0.0) -> None:
        self.size, self._driver, self._begin, self._hung = size, driver, begin, hung
        self._workers: list[_Worker] = []
        self._events: list[Event] = []

    @property
    def idle(self) -> int:
        """Number of workers that wait for a task."""
        return sum(worker.task is None for worker in self._workers)

    @property
    def busy(self) -> int:
        """Number of tasks whose end the driver has not heard of."""
        return sum(worker.task is not None for worker in self._workers) + len(self._events)

    @property
    def alive(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most `size`."""
        while len(self._workers) < min(wanted, self.size):
            worker = _Worker()
            self._workers.append(worker)
            name = f"{self._driver.name}'s worker"
            worker.actor = self._driver.schedule.start(name, lambda actor, worker=worker: self._work(actor, worker))

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker."""
        next(worker for worker in self._workers if worker.task is None).task = task

    def wait(self, seconds: float, limit: Limit) -> list[Event]:
        """Let others go on, and return what happened."""
        self._driver.step("waits for its workers", yields=True)
        random = self._driver.schedule.random
        for worker in [worker for worker in self._workers if worker.task is not None]:
            if random.random() < self._hung:
                self._driver.schedule.fired["worker: taken for hung"] += 1
                self._forget(worker)
                self._events.append(Event(worker.task, failure="it hangs", node="a"))
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """End every worker; one at work may be late to notice, and goes on for a while."""
        for worker in self._workers:
            worker.heard, worker.closed = False, True
            if worker.task is not None and self._driver.schedule.random.random() < 0.5:
                worker.actor.dead = True
        self._workers = []

    def _forget(self, worker: _Worker) -> None:
        worker.heard, worker.closed = False, True
        self._workers.remove(worker)

    def _work(self, actor: Actor, worker: _Worker) -> None:
        context = self._begin(actor)
        while True:
            actor.wait_for(lambda: worker.task is not None or worker.closed)
            if worker.task is None:
                return
            task = worker.task
            try:
                outcome = outcome_of(lambda task=task: context.carry_out(task))
            except Crash:
                self._tell(worker, Event(task, failure="its node was lost", lost=True))
                raise
            if isinstance(outcome, Raised):
                self._tell(worker, event_of(task, outcome, "a"))
                return
            if not worker.heard:
                return
            worker.task = None
            self._events.append(Event(task, receipt=outcome, seconds=1.0))

    def _tell(self, worker: _Worker, event: Event) -> None:
        """Say that a worker is gone, and why, to whoever listens."""
        if worker.heard:
            self._forget(worker)
            self._events.append(event)
