"""The loop: submit, wait, requeue, until every task is done or a budget is spent."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from laplace_dist.errors import CheckpointError, RunFailed, SettingsError

SAME_FAILURE = 3  # the same failure of one task as often as this stops the run
ANY_FAILURE = 6  # failures of any kind of one task
TICK_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """One unit of work; its effect lies in the store, so that doing it twice changes nothing.

    Attributes:
        target: `module:function`, called as `function(context, **kwargs)` in a worker.
        kwargs: Small and plain arguments.
        what: The task in a person's words, such as `segment 000003 (examples 768 to 1023)`.
    """

    target: str
    kwargs: Mapping[str, Any]
    what: str


@dataclass(frozen=True)
class Event:
    """What became of a task, or of a worker's start where `task` is None: one of the three fields is set.

    Attributes:
        receipt: What the task returned.
        failure: Why it should be tried again, elsewhere.
        refusal: An error that would come again wherever it ran.
    """

    task: Task | None
    receipt: Any = None
    failure: str | None = None
    refusal: Exception | None = None


class Workers(Protocol):
    """What the loop needs of a pool of workers; `cluster.Pool` is the one with Ray behind it."""

    size: int
    idle: int
    busy: int

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most `size`."""

    def submit(self, task: Task, timeout: float | None) -> None:
        """Give a task to an idle worker."""

    def wait(self, seconds: float) -> list[Event]:
        """Return what happened within so many seconds."""


@dataclass
class Budget:
    """Counts failures and decides when to stop trying.

    Attributes:
        without_progress: Failures in a row, over all tasks and workers, with no task finished in between.
    """

    without_progress: int
    _by_task: dict[str, Counter[str]] = field(default_factory=dict)
    _in_a_row: int = 0

    def success(self, task: Task) -> None:
        """Record a finished task."""
        self._in_a_row = 0
        self._by_task.pop(task.what, None)

    def failure(self, task: Task | None, why: str) -> None:
        """Record a failure.

        Raises:
            RunFailed: A budget is spent.
        """
        self._in_a_row += 1
        what = task.what if task is not None else "starting a worker"
        seen = self._by_task.setdefault(what, Counter())
        seen[why] += 1
        if seen[why] >= SAME_FAILURE or seen.total() >= ANY_FAILURE:
            times = seen[why] if seen[why] >= SAME_FAILURE else seen.total()
            raise RunFailed(f"{what} failed {times} times, the last time because {why}. {_REMEDY}")
        if self._in_a_row >= self.without_progress:
            raise RunFailed(
                f"{self._in_a_row} failures in a row with nothing finished in between; the last one: {what}: {why}. "
                f"{_REMEDY}"
            )


_REMEDY = "Everything committed so far is kept: remove the cause and run the same command again."


def run_tasks(
    pool: Workers,
    tasks: Iterable[Task],
    on_done: Callable[[Task, Any], None],
    *,
    timeout: float | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Carry out every task at least once.

    Tasks are drawn as workers become free, so that a generator of them is never held in memory; a failed one goes to
    the back of what has been drawn. A worker with which anything went wrong is not used again.

    Args:
        pool: The workers.
        tasks: The tasks, possibly generated while they are drawn.
        on_done: Called with each finished task and its receipt, in the order in which they finish.
        timeout: Seconds that one task may take; None for no limit.
        tick: Called about once a second.

    Raises:
        SettingsError, CheckpointError, RunFailed: As a task raised them, or a budget of failures is spent.
    """
    drawn, tasks = deque(), iter(tasks)
    budget = Budget(without_progress=max(10, 3 * pool.size))
    while True:
        drawn.extend(islice(tasks, max(0, pool.size - len(drawn))))
        if not drawn and not pool.busy:
            return
        pool.top_up(pool.busy + len(drawn))
        while pool.idle and drawn:
            pool.submit(drawn.popleft(), timeout)
        for event in pool.wait(TICK_SECONDS):
            if event.refusal is not None:
                raise _refused(event.task, event.refusal)
            if event.failure is not None:
                budget.failure(event.task, event.failure)
                drawn.extend([event.task] if event.task is not None else [])
            else:
                budget.success(event.task)
                on_done(event.task, event.receipt)
        tick()


def _refused(task: Task | None, error: Exception) -> Exception:
    """Return the error that stops the run: the task's own, with the task's name where it says nothing of it."""
    if task is None or isinstance(error, (SettingsError, CheckpointError, RunFailed)):
        return error
    return RunFailed(f"{task.what}: {error}")
