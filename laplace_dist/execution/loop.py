"""The loop: submit, wait, requeue, until every task is done or a budget is spent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.execution.failures import Budget
from laplace_dist.execution.tasks import Event, Task, Workers
from laplace_dist.execution.timeouts import Limit

TICK_SECONDS = 1.0


def run_tasks(
    pool: Workers,
    tasks: Iterable[Task],
    on_done: Callable[[Task, Any], None],
    *,
    limit: Limit | None = None,
    tick: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Carry out every task at least once.

    Tasks are drawn as workers become free, so that a generator of them is never held in memory; a failed one goes to
    the back of what has been drawn. A worker with which anything went wrong is not used again.

    Args:
        pool: The workers.
        tasks: The tasks, possibly generated while they are drawn.
        on_done: Called with each finished task and its receipt, in the order in which they finish.
        limit: How long one task may take; none if not given.
        tick: Called about once a second.
        say: Called with a line for people about each failure.

    Raises:
        SettingsError, CheckpointError, RunFailed: As a task raised them, or a budget of failures is spent.
    """
    limit = limit or Limit(float("inf"))
    drawn, tasks = deque(), iter(tasks)
    budget = Budget(without_progress=max(10, 3 * pool.size))
    while True:
        drawn.extend(islice(tasks, max(0, pool.size - len(drawn))))
        if not drawn and not pool.busy:
            return budget.check()
        pool.top_up(pool.busy + len(drawn))
        while pool.idle and drawn:
            pool.submit(drawn.popleft())
        for event in pool.wait(TICK_SECONDS, limit):
            if event.refusal is not None:
                raise _refused(event.task, event.refusal)
            if event.failure is not None:
                again = budget.failure(event.task, event.failure)
                drawn.extend([event.task] if again and event.task is not None else [])
                say(_news(event, again))
            else:
                budget.success(event.task)
                limit.finished(event.seconds)
                on_done(event.task, event.receipt)
        tick()


def _news(event: Event, again: bool) -> str:
    """Return a failure as a line for people."""
    if event.task is None:
        return f"a worker could not start, and another one is tried: {event.failure}"
    then = "it is done again" if again else "it is set aside, and the others go on"
    return f"{event.task.what}: {event.failure}; {then}"


def _refused(task: Task | None, error: Exception) -> Exception:
    """Return the error that stops the run: the task's own, with the task's name where it says nothing of it."""
    if task is None or isinstance(error, (SettingsError, CheckpointError, RunFailed)):
        return error
    return RunFailed(f"{task.what}: {error}")
