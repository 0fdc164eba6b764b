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
    """

    actor: Any
    node: str


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
