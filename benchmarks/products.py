"""Products of float32 matrices by torch (MKL) and by oneDNN, which decide where the library takes which.

    python benchmarks/products.py [--threads 1]

`left @ right.T` of every shape, and the sum of the outer products of 2,304 rows; microseconds, the least of several repeats.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from unittest import mock

import torch

from laplace.linalg import gram, matmul

SIZES = (8, 32, 128, 512)
WIDTHS = (10, 64, 256, 1024)


def microseconds(run: Callable[[], object]) -> float:
    """Return the time of one call, the least of some repeats of as many as take 10 ms."""
    run()
    calls, best = 1, float("inf")
    for _ in range(12):
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        taken = time.perf_counter() - begun
        best = min(best, taken / calls)
        calls = calls if taken > 0.01 else 4 * calls
    return 1e6 * best


def both(run: Callable[[], object]) -> tuple[float, float]:
    """Return the times by torch and by oneDNN, whatever the processor prefers."""
    found = []
    for faster in (False, True):
        with (
            mock.patch.object(matmul, "is_faster", lambda faster=faster: faster),
            mock.patch.object(matmul, "_fewest", lambda: 0),
        ):
            found.append(microseconds(run))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"taken by default on this processor: {'oneDNN' if matmul.is_faster() else 'torch'}")
    print("| rows | terms | columns | multiplications | torch | oneDNN | ratio |\n" + "| --- " * 7 + "|")
    for m, k, n in itertools.product(SIZES, WIDTHS, WIDTHS):
        left, right = torch.randn(m, k), torch.randn(n, k)
        old, new = both(lambda left=left, right=right: matmul.times_transposed(left, right))
        print(f"| {m} | {k} | {n} | {m * k * n:,} | {old:.1f} | {new:.1f} | {old / new:.2f} |")
    print("\n| outer products of 2,304 rows of | torch | oneDNN | ratio |\n" + "| --- " * 4 + "|")
    for width in (192, 512, 1024, 2304):
        rows, total = torch.randn(2304, width).split(256), torch.zeros(width, width, dtype=torch.float64)
        old, new = both(lambda total=total, rows=rows: gram.add_gram_(total, rows))
        print(f"| {width} | {old:,.0f} | {new:,.0f} | {old / new:.2f} |")


if __name__ == "__main__":
    main()
