"""Processes that a machine's kernel has ended for want of memory: it counts them, and nobody else can tell.

Of a worker that was killed Ray says the same as of one that crashed. What tells them apart is the kernel's count on that node,
which has risen since the worker's last answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

VMSTAT = "/proc/vmstat"

Poll = Callable[[], tuple[bool, int | None]]


def kernel_kills() -> int | None:
    """Return how many processes this machine's kernel has ended for memory since it was started, in containers too.

    None where it does not count them.
    """
    place = Path(VMSTAT)
    return _count_in(place.read_text()) if place.exists() else None


def ask_node(node: str) -> Poll:
    """Ask a node of the cluster for its kernel's count; returns what says whether it has answered, and what.

    The question goes to a process that exists already or is as small as Ray's are: the node may be short of memory still. What
    cannot be asked or does not know has answered with None.

    Args:
        node: Ray's name of it.
    """
    import ray

    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    read = ray.remote(num_cpus=0, max_retries=0)(
        lambda path: Path(path).read_text()
    )  # by value: nothing is imported there
    asked = read.options(scheduling_strategy=there).remote(VMSTAT)

    def poll() -> tuple[bool, int | None]:
        if not ray.wait([asked], timeout=0)[0]:
            return False, None
        try:
            return True, _count_in(ray.get(asked))
        except (ray.exceptions.RayError, OSError):  # as of a file that is not there
            return True, None

    return poll


def _count_in(vmstat: str) -> int | None:
    found = re.search(r"^oom_kill (\d+)$", vmstat, re.MULTILINE)
    return int(found[1]) if found else None
