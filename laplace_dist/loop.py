"""The loop: submit, wait, requeue, until every task is done or a budget is spent."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.limit import Limit

SAME_FAILURE = 3  # a task with the same failure as often as this is set aside: the others go on without it
ANY_FAILURE = 6  # or with failures of any kind
START_FAILURES = 8  # starts of workers that fail with no task finished in between stop the run
SET_ASIDE = 10  # tasks set aside that stop the run, since then it is not a few examples that are bad
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
    """What became of a task, or of a worker's start where `task` is None: one of receipt, failure, refusal is set.

    Attributes:
        receipt: What the task returned.
        failure: Why it should be tried again, elsewhere.
        refusal: An error that would come again wherever it ran.
        seconds: How long the task took.
    """

    task: Task | None
    receipt: Any = None
    failure: str | None = None
    refusal: Exception | None = None
    seconds: float = 0.0


class Workers(Protocol):
    """What the loop needs of a pool of workers; `cluster.Pool` is the one with Ray behind it."""

    size: int
    idle: int
    busy: int

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most `size`."""

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker."""

    def wait(self, seconds: float, limit: Limit) -> list[Event]:
        """Return what happened within so many seconds; a task in flight for longer than the limit has failed."""


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
        self._by_task.pop(_START, None)

    def failure(self, task: Task | None, why: str) -> bool:
        """Record a failure; returns whether the task is to be tried again.

        Raises:
            RunFailed: A budget of the whole run is spent.
        """
        self._in_a_row += 1
        what = task.what if task is not None else _START
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


_START = "starting a worker"


def _sentences(causes: list[str]) -> str:
    text = "\n".join(f"{cause.rstrip('.')}." for cause in causes)
    return f"{text}{' ' if len(causes) == 1 else chr(10)}{_REMEDY}"


_REMEDY = "Everything committed so far is kept: remove the cause and run the same command again."


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
