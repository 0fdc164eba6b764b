"""A row of the table: what is timed on both sides, what the mathematics needs, and what is to be reached."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Prepare = Callable[[], Callable[[], object]]  # everything that is not timed; returns what is
WARM_UPS = 1
LONG = 20.0  # seconds: what warms up is little beside a first run that takes longer, which counts, and no other is made


@dataclass(frozen=True)
class Target:
    """What a row is to reach.

    Attributes:
        kind: `peer` (the fastest peer's time over ours), `rate` (of the machine's matrix products), `seconds`, or the label of
            something that is measured beside ours.
        bound: At least this for `peer`, `rate` and a `faster` one, at most this for the others.
        form: Of a label: `times` ours over it, it over ours (`faster`), or the `value` itself.
    """

    kind: str
    bound: float
    form: Literal["times", "faster", "value", "at least"] = "times"

    @property
    def larger_is_better(self) -> bool:
        """Whether the bound is a lower one."""
        return self.kind in ("peer", "rate") or self.form in ("faster", "at least")

    def value(self, found: Mapping[str, Any]) -> float | None:
        """Return what a row has reached; None without a peer."""
        if self.kind == "seconds":
            return found["ours"]
        if self.kind == "peer":
            return found.get("peer")
        if self.kind == "rate":
            return found["gflop"] / found["ours"] / found["rate"]
        if self.form == "times":
            return found["ours"] / found[self.kind]
        return found[self.kind] / found["ours"] if self.form == "faster" else found[self.kind]

    def text(self, value: float) -> str:
        """Return a value beside the bound, and whether it is missed."""
        missed = value < self.bound if self.larger_is_better else value > self.bound
        unit = {"peer": " ×", "rate": " of the rate", "seconds": " s"}.get(self.kind) or self._unit()
        return f"{value:.3g}{unit} ({'≥' if self.larger_is_better else '≤'} {self.bound:g}){' **missed**' if missed else ''}"

    def _unit(self) -> str:
        plural = f"{self.kind}es" if self.kind.endswith("s") else f"{self.kind}s"
        return {"times": f" {plural}", "faster": f" × {self.kind}"}.get(self.form, f" {self.kind}")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: In words, with the number of examples.
        ours: What is timed here, by label: `ours`, and what counts as one; or, where a row measures in its own way, the
            figures themselves.
        targets: What is to be reached.
        peers: What is timed in the peers' environment, by the peer's name.
        gflop: What the mathematics needs, in units of 10⁹ floating-point operations.
        profiled: What a profile is of, by label, where that is less than, or other than, what is timed; or the lines of one.
    """

    name: str
    ours: Callable[[], Mapping[str, Prepare | float]]
    targets: tuple[Target, ...]
    peers: Callable[[], Mapping[str, Prepare]] | None = None
    gflop: Callable[[], float] | None = None
    profiled: Callable[[], Mapping[str, Prepare | list[str]]] | None = None


def seconds(prepare: Prepare, runs: int) -> float:
    """Return the median time of some runs, after one that does not count; that of the first one if it is long."""
    times = []
    for _ in range(WARM_UPS + runs):
        run = prepare()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if times[0] > LONG:
            break
    return statistics.median(times[WARM_UPS:] or times)


def machine_rate() -> float:
    """Return what the machine's products of float32 matrices reach, in 10⁹ operations per second: by MKL or by oneDNN."""
    n = 2048
    a, b = torch.rand(n, n), torch.rand(n, n)
    ways = [lambda: a @ b]
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return 2 * n**3 / min(seconds(lambda way=way: way, 3) for way in ways) / 1e9
