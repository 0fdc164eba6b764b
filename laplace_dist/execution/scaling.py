"""Where workers go: what fits on each node, which nodes are there now, and how many workers there are to be.

The cluster may change at any time: nodes that join are used, nodes that leave are not waited for, and where there is none
yet, the run waits for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Seconds between two looks at the list of nodes: it costs the head a few milliseconds, and a node needs minutes to join.
LOOK_SECONDS = 2.0
# Workers that room is asked for where there is room for few. Ray does not say what an autoscaler's limits are, so it is asked
# for twice what there is, again and again: it stops at its limits, and no more is asked for than there are tasks.
FIRST_WORKERS = 16


@dataclass(frozen=True)
class Node:
    """A node of the cluster that lives.

    Attributes:
        id: Ray's.
        address: `host:port` at which it can be asked whether it lives.
        total: Its resources by Ray's names.
        free: Those that nobody has reserved, as of some moments ago.
    """

    id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def nodes_of(ray: Any) -> list[Node]:
    """Return the living nodes of the cluster that this process has joined."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            node["NodeID"],
            f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
            node["Resources"],
            free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def how_many(have: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Return how many workers fit into some resources."""
    return min(int((have.get(name, 0.0) + 1e-9) // amount) for name, amount in need.items() if amount > 0)


class Placement:
    """Decides on which nodes workers are started.

    Args:
        look: Returns the nodes that live.
        need: What one worker reserves, by Ray's names.
        wanted: How many workers there are to be, if the user says; as many as fit, or can be made to, if not.
        demand: Called with the number of workers that there is to be room for, where nodes may join: an autoscaler sees to it.
            None where none can.
    """

    def __init__(
        self,
        look: Callable[[], list[Node]],
        need: Mapping[str, float],
        wanted: int | None = None,
        demand: Callable[[int], None] | None = None,
    ) -> None:
        self.need, self._look, self._wanted, self._demand = need, look, wanted, demand
        self._asked, self._looked = 0, float("-inf")
        self.nodes: dict[str, Node] = {}

    def refresh(self, now: float) -> None:
        """Look which nodes there are, if the last look is some time ago."""
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self.nodes = {node.id: node for node in self._look()}

    def look_again(self) -> None:
        """Have the next refresh look in any case, since something has changed."""
        self._looked = float("-inf")

    @property
    def usable(self) -> list[str]:
        """The nodes on which at least one worker fits."""
        return [node.id for node in self.nodes.values() if how_many(node.total, self.need) > 0]

    @property
    def fits(self) -> int:
        """How many workers fit on the nodes that there are, each of them on one node."""
        return sum(max(0, how_many(node.total, self.need)) for node in self.nodes.values())

    @property
    def size(self) -> int:
        """How many workers there would be with enough to do; at least one, since nodes may join."""
        there = self.fits if self._demand is None else max(2 * self.fits, FIRST_WORKERS)
        return max(1, self._wanted or there)

    @property
    def elastic(self) -> bool:
        """Whether nodes come and go with what is asked for."""
        return self._demand is not None

    def ask(self, workers: int) -> None:
        """Have room made for so many workers, or let go of it when it is half as much as was asked for or less."""
        more = workers > max(self.fits, self._asked)
        if self._demand is not None and (more or 0 < workers <= self._asked // 2):
            self._asked = workers
            self._demand(workers)

    def places(
        self, count: int, starting: Counter[str], taken: Counter[str], allowed: Callable[[str], bool]
    ) -> list[str]:
        """Return the nodes for so many more workers, the emptiest first; fewer where there is no more room now.

        Args:
            count: Of workers to be started.
            starting: Workers under way by node, whose resources may still look free.
            taken: Workers by node, with those under way.
            allowed: Says whether a worker may be started on a node.
        """
        room = Counter(
            {
                node.id: min(
                    how_many(node.total, self.need) - taken[node.id], how_many(node.free, self.need) - starting[node.id]
                )
                for node in self.nodes.values()
                if allowed(node.id)
            }
        )
        chosen = []
        while len(chosen) < count and room and (best := room.most_common(1)[0])[1] > 0:
            chosen.append(best[0])
            room[best[0]] -= 1
        return chosen

    def describe(self) -> str:
        """Return what there is, in words, for somebody who waits."""
        free = Counter()
        for node in self.nodes.values():
            free.update({name: node.free.get(name, 0.0) for name in ("CPU", "GPU")})
        memory = f", {self.need['memory']:,.0f} bytes of memory" if "memory" in self.need else ""
        return (
            f"a worker needs {self.need['CPU']:g} CPU and {self.need['GPU']:g} GPU{memory} on one node; the cluster has "
            f"{len(self.nodes)} node(s), room for {self.fits} worker(s) in all, and {free['CPU']:g} CPU and "
            f"{free['GPU']:g} GPU free now"
        )
