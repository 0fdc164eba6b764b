"""Patches of convolutions: torch's own kernel against the copy of a view that fits take, on CPUs.

    python benchmarks/patches.py

Milliseconds, the least of some runs, channels first, kernels of 3 × 3 padded by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from laplace.capture import geometry
from laplace.capture.geometry import Geometry

CASES = ((14, 32, 32, 2), (28, 64, 16, 2), (16, 64, 8, 1), (4, 64, 56, 1), (32, 512, 2, 1))


def least(call: Callable[[], object], runs: int = 20) -> float:
    """Milliseconds of the fastest of some runs."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


def main() -> None:
    """Print one row for each size."""
    geometry._NARROW = 0  # the copy everywhere, also where it is slower
    print("| images, channels, pixels a side, stride | threads | torch | copy |", "| --- | --- | --- | --- |", sep="\n")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for n, channels, side, stride in CASES:
            x = torch.rand(n, channels, side, side)
            of = Geometry((3, 3), (stride, stride), (1, 1), ((1, 1), (1, 1)))
            own, copy = least(lambda x=x, s=stride: F.unfold(x, 3, 1, 1, s)), least(lambda x=x, of=of: of.patches(x))
            print(f"| {n}, {channels}, {side}, {stride} | {threads} | {own:.2f} | {copy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
