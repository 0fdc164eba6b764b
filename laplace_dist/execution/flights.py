"""A worker of Ray's, and what it has been asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from laplace_dist.execution.tasks import Task


@dataclass(frozen=True)
class Hired:
    """A worker.

    Attributes:
        actor: Ray's handle.
        node: The node that it was started on.
        commits: The task whose commit goes on in it.
        since: When it was last given back, by the monotonic clock.
    """

    actor: Any
    node: str
    commits: Committing | None = None
    since: float = 0.0


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
