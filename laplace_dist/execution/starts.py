"""Starts of workers that fail: how long a node rests after one, and when it is left out for good.

A node may lack a library, a driver or the data, and then every worker fails there; that is no reason to stop the run, as
long as most nodes do better. A start that was lost with its node is not counted at all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from laplace_dist.execution.failures import STARTS_PER_NODE, STARTS_WITHOUT_MEMORY

# Seconds before another worker is started on a node after one could not be: at first, and at most. Short enough to go
# unnoticed once, long enough that a node which is going away is known to be gone before it is tried for the last time.
RESTS = 0.5, 16.0


@dataclass
class _Node:
    failed: int = 0
    without_memory: int = 0
    rest: float = RESTS[0]
    noticed: float = float("-inf")
    until: float = float("-inf")


@dataclass
class Starts:
    """What became of the starts on each node.

    Attributes:
        left_out: Why a node is not used again, by node.
    """

    left_out: dict[str, str] = field(default_factory=dict)
    _nodes: dict[str, _Node] = field(default_factory=dict)

    def succeeded(self, node: str) -> None:
        """Record a worker that came to life."""
        self._nodes.pop(node, None)

    def failed(
        self, node: str, why: str, *, begun: float, now: float, final: bool = False, memory: bool = False
    ) -> bool:
        """Record a worker that did not; returns whether the node is left out from now on.

        Args:
            node: Where.
            why: As a phrase.
            begun: When it was started. Those that were under way when another one failed count as the same failure.
            now: The time.
            final: The error would be the same at the next start.
            memory: The node ran low on memory, which passes more often than other causes.
        """
        record = self._nodes.setdefault(node, _Node())
        if begun <= record.noticed:
            return node in self.left_out
        record.failed += not memory
        record.without_memory += memory
        record.noticed, record.until = now, now + record.rest
        record.rest = min(2 * record.rest, RESTS[1])
        if final or record.failed >= STARTS_PER_NODE or record.without_memory >= STARTS_WITHOUT_MEMORY:
            self.left_out[node] = why
        return node in self.left_out

    def may_start(self, node: str, now: float) -> bool:
        """Say whether a worker may be started on a node now."""
        return node not in self.left_out and now >= self._nodes.get(node, _Node()).until

    def spent(self, nodes: Collection[str]) -> bool:
        """Say whether most of these nodes are left out, so that it is not a few nodes that are bad."""
        return 2 * sum(node in self.left_out for node in nodes) > len(nodes)
