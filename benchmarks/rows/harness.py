"""A row of the table: what is timed on both sides, what the mathematics needs, and what is to be reached."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Prepare = Callable[[], Callable[[], object]]  # everything that is not timed; returns what is
WARM_UPS = 1


@dataclass(frozen=True)
class Target:
    """What a row is to reach.

    Attributes:
        kind: `peer` (the fastest peer's time over ours), `rate` (of the machine's matrix products), `seconds`, or the label of
            something that is timed beside ours and counts as one, such as `epoch`.
        bound: At least this for `peer` and `rate`, at most this for the others.
    """

    kind: str
    bound: float

    @property
    def at_least(self) -> bool:
        """Whether larger is better."""
        return self.kind in ("peer", "rate")

    def text(self, value: float) -> str:
        """Return a value beside the bound, and whether it is missed."""
        missed = value < self.bound if self.at_least else value > self.bound
        plural = f"{self.kind}es" if self.kind.endswith("s") else f"{self.kind}s"
        unit = {"peer": " ×", "rate": " of the rate", "seconds": " s"}.get(self.kind, f" {plural}")
        return f"{value:.3g}{unit} ({'≥' if self.at_least else '≤'} {self.bound:g}){' **missed**' if missed else ''}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: In words, with the number of examples.
        ours: What is timed here, by label: `ours`, and what counts as one.
        targets: What is to be reached.
        peers: What is timed in the peers' environment, by the peer's name.
        gflop: What the mathematics needs, in units of 10⁹ floating-point operations.
    """

    name: str
    ours: Callable[[], Mapping[str, Prepare]]
    targets: tuple[Target, ...]
    peers: Callable[[], Mapping[str, Prepare]] | None = None
    gflop: Callable[[], float] | None = None


def seconds(prepare: Prepare, runs: int) -> float:
    """Return the median time of some runs, after one that does not count."""
    times = []
    for _ in range(WARM_UPS + runs):
        run = prepare()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UPS:])


def machine_rate() -> float:
    """Return what the machine's products of float32 matrices reach, in 10⁹ operations per second."""
    n = 2048
    a, b = torch.rand(n, n), torch.rand(n, n)
    return 2 * n**3 / seconds(lambda: lambda: a @ b, 3) / 1e9
