"""The loop: submit, wait, requeue, until every task is done, a budget is spent, or somebody asks to stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.execution import signals
from laplace_dist.execution.failures import Budget
from laplace_dist.execution.stragglers import InFlight
from laplace_dist.execution.tasks import Event, Task, Workers
from laplace_dist.execution.timeouts import GRACE_SECONDS, Limit

TICK_SECONDS = 1.0


def run_tasks(
    pool: Workers,
    tasks: Iterable[Task],
    on_done: Callable[[Task, Any], None],
    *,
    limit: Limit | None = None,
    tick: Callable[[int, str], None] = lambda busy, oldest: None,
    say: Callable[[str], None] = lambda text: None,
    on_failure: Callable[[Event], None] = lambda event: None,
    alike: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Carry out every task at least once.

    Tasks are drawn as workers become free, so that a generator of them is never held in memory; a failed one goes to
    the back of what has been drawn. A worker with which anything went wrong is not used again. When none is left to draw, idle
    workers begin those again that take too long; what finishes first counts, and nobody waits for the other. After SIGINT or
    SIGTERM no task is submitted, and those in flight have some time to finish.

    Args:
        pool: The workers.
        tasks: The tasks, possibly generated while they are drawn.
        on_done: Called with each finished task and its receipt, in the order in which they finish.
        limit: How long one task may take; none if not given.
        tick: Called about once a second with the number of tasks in flight and the oldest of them in words.
        say: Called with a line for people about each failure.
        on_failure: Called with each failure.
        alike: The tasks are of about one size, so that one which takes much longer than others is slow, and not large.
        clock: Seconds, by which attempts are timed.

    Raises:
        SettingsError, CheckpointError, RunFailed: As a task raised them, or a budget of failures is spent.
        Interrupted: A signal came.
    """
    limit = limit or Limit(float("inf"))
    drawn, tasks, flight = deque(), iter(tasks), InFlight(alike)
    budget, most = Budget(), 0
    with signals.deferred() as seen:
        while not seen.number:
            drawn.extend(islice(tasks, max(0, max(1, pool.size) - len(drawn))))
            if not drawn and not flight:
                budget.check()
                return
            pool.top_up(pool.busy + len(drawn))
            while pool.idle and drawn:
                task = drawn.popleft()
                flight.begin(task, clock())
                pool.submit(task)
            for task in flight.late(clock())[: pool.idle] if not drawn else []:
                flight.begin(task, clock())
                pool.submit(task)
                say(
                    f"{task.what}: takes much longer than others; an idle worker does it too, and the first to finish counts"
                )
            most = max(most, pool.busy)
            for event in pool.wait(TICK_SECONDS, limit):
                if event.refusal is not None:
                    raise _refused(event.task, event.refusal)
                if not flight.knows(event):
                    continue  # the other attempt was first
                if event.failure is not None:
                    on_failure(event)
                    if flight.failed(event):
                        say(f"{event.task.what}: {event.failure}; another attempt at it goes on")
                        continue
                    again = budget.failure(event, most)
                    drawn.extend([event.task] if again else [])
                    say(_news(event, again))
                else:
                    budget.success(event)
                    limit.finished(event.seconds)
                    flight.finished(event)
                    on_done(event.task, event.receipt)
            tick(pool.busy, flight.oldest)
        _let_finish(pool, limit, flight, on_done)


def _let_finish(pool: Workers, limit: Limit, flight: InFlight, on_done: Callable[[Task, Any], None]) -> None:
    """Wait for the tasks in flight, for so long as an interrupted job may take."""
    end = time.monotonic() + GRACE_SECONDS
    while flight and pool.busy and (left := end - time.monotonic()) > 0:
        for event in pool.wait(min(left, TICK_SECONDS), limit):
            if event.receipt is not None and flight.knows(event):
                flight.finished(event)
                on_done(event.task, event.receipt)


def _news(event: Event, again: bool) -> str:
    """Return a failure as a line for people."""
    then = "it is done again" if again else "it is set aside, and the others go on"
    return f"{event.task.what}: {event.failure}; {then}"


def _refused(task: Task | None, error: Exception) -> Exception:
    """Return the error that stops the run: the task's own, with the task's name where it says nothing of it."""
    if task is None or isinstance(error, (SettingsError, CheckpointError, RunFailed)):
        return error
    return RunFailed(f"{task.what}: {error}")
