"""What the loop, its workers and the stages have in common: tasks, what becomes of them, and who carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from laplace_dist.execution.timeouts import Limit


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
