"""A worker of Ray's, and what it has been asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from laplace_dist.execution.tasks import Event, Task


@dataclass(frozen=True)
class Hired:
    """A worker.

    Attributes:
        actor: Ray's handle.
        node: The node that it was started on.
        commits: The task whose commit goes on in it.
        since: When it was last given back, by the monotonic clock.
        kills: Of its answer before: see `Answer`.
    """

    actor: Any
    node: str
    commits: Committing | None = None
    since: float = 0.0
    kills: int | None = None

    @property
    def commit_lost(self) -> Event | None:
        """That its commit was lost with it, which says nothing of the task: the worker was at another one."""
        why = "its worker was lost before it was committed"
        return None if self.commits is None else Event(self.commits.task, failure=why, lost=True)


@dataclass(frozen=True)
class Committing:
    """A task that was computed and whose commit goes on.

    Attributes:
        task: The task.
        seconds: How long it was computed.
    """

    task: Task
    seconds: float


@dataclass(frozen=True)
class Flight:
    """A call that has not returned.

    Attributes:
        hired: Who was called.
        task: What for; None for the worker's start.
        begun: When.
    """

    hired: Hired
    task: Task | None
    begun: float
