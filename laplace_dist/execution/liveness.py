"""Whether a worker died alone or with its node, which decides whether its task is to blame.

Ray's own words for a lost node come late or not at all: while a node goes away its workers may be gone first, and a call
that breaks off is reported as `ActorUnavailableError` while the head still lists the node as alive. So a node is asked
itself, and once more a moment later, before a task is blamed. Meanwhile its kernel is asked whether it has ended a process for
memory, which Ray does not know of.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from laplace_dist.execution.failures import LESS_MEMORY
from laplace_dist.execution.flights import Flight
from laplace_dist.execution.kernel_kills import Poll, ask_node
from laplace_dist.execution.scaling import Placement

# Seconds until a node is asked again whose worker died. A machine that is being shut down ends its processes within about a
# second, in any order; and the next worker takes longer to start than this.
SECOND_LOOK = 2.0
COUNT_SECONDS = 10.0  # for which its kernel's count is waited for after that: a process may have to be started for it
ANSWER_SECONDS = 2.0  # for which a node is waited for when it is asked; one that is there answers in milliseconds


def node_answers(address: str) -> bool:
    """Say whether something listens at a node's `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False


def short_of_memory(error: Exception) -> bool:
    """Say whether Ray ended a worker because its node ran low on memory."""
    from ray.exceptions import OutOfMemoryError

    return isinstance(error, OutOfMemoryError) or "running low on memory" in str(error)


def why_it_died(error: Exception, lost: bool = False, killed: bool = False) -> str:
    """Return as a phrase why a worker died: what Ray says of it, and whether its node's kernel ended processes for memory."""
    if getattr(error, "preempted", False):
        return "its node was preempted"
    if lost:
        return "its node was lost"
    if getattr(error, "actor_init_failed", False):
        return f"a worker could not be set up: {str(error).strip().splitlines()[-1]}"
    if short_of_memory(error):
        return f"Ray ended the worker because its node ran low on memory. {LESS_MEMORY}"
    if killed:
        return f"the worker was killed as the kernel of its node ended a process for want of memory. {LESS_MEMORY}"
    return (
        "the worker's process died, and its node lives on (killed, or a crash in native code; if it was killed for its "
        "memory, lower --num-workers or --batch-size)"
    )


@dataclass
class _Death:
    flight: Flight
    error: Exception
    ask_again: float
    kills: Poll | None


class Deaths:
    """Workers that died, until it is known whether their node did.

    Args:
        placement: Knows the nodes that the cluster lists as alive.
        answers: Says whether something listens at `host:port`.
    """

    def __init__(self, placement: Placement, answers: Callable[[str], bool] = node_answers) -> None:
        self._placement, self._answers = placement, answers
        self._open: list[_Death] = []

    @property
    def flights(self) -> list[Flight]:
        """What the workers were doing whose deaths are not judged yet."""
        return [death.flight for death in self._open]

    def record(self, flight: Flight, error: Exception, now: float) -> None:
        """Take note of a death."""
        told = _preempted(error) or short_of_memory(error) or flight.hired.kills is None
        self._open.append(_Death(flight, error, now + SECOND_LOOK, None if told else ask_node(flight.hired.node)))

    def judged(self, now: float) -> Iterator[tuple[Flight, Exception, bool, bool]]:
        """Yield the deaths that are clear by now, each with whether the node was lost, or has ended processes for memory."""
        if not self._open:
            return
        self._placement.look_again()
        self._placement.refresh(now)
        lives: dict[str, bool] = {}
        for death in list(self._open):
            node = death.flight.hired.node
            if node not in lives:
                lives[node] = not _preempted(death.error) and self._lives(node)
            answered, kills = (True, None) if death.kills is None or not lives[node] else death.kills()
            if not lives[node] or (now >= death.ask_again + (0 if answered else COUNT_SECONDS)):
                self._open.remove(death)
                killed = kills is not None and kills > death.flight.hired.kills
                yield death.flight, death.error, not lives[node], killed

    def _lives(self, node: str) -> bool:
        found = self._placement.nodes.get(node)
        return found is not None and self._answers(found.address)


def _preempted(error: Any) -> bool:
    return bool(getattr(error, "preempted", False))
