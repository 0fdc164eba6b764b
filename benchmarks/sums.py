"""What decides how outer products of float32 rows are added up on CPUs: the length of runs, and sums over patches without them.

    python benchmarks/sums.py

Milliseconds, the least of some runs, for one and two threads; errors are those of the worst of some rows that are built to lose
what is small: one large row before equal ones of 6e-8 to 1e-4 of its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from patches import least
from torch import Tensor

from laplace.capture import patch_gram
from laplace.capture.geometry import Geometry
from laplace.linalg import gram, small_rows
from laplace.linalg.heap import keeping_freed
from laplace.structures import kron

RUNS = (16, 24, 28, 32, 64, 128)
SMALL = ((131072, 32), (32768, 64), (8192, 120))  # rows, width
WIDE = ((2304, 1024), (3584, 288))
IMAGES = ((64, 64, 32), (64, 128, 16), (64, 256, 8), (16, 64, 56), (32, 256, 14), (64, 512, 7), (64, 512, 4))


def worst(width: int) -> float:
    """The largest relative error of a sum."""
    found = []
    for n in (512, 4096):
        for small in (5.9e-8, 1e-6, 1e-4):
            rows = torch.full((n, width), small**0.5)
            rows[0] = 1
            truth, total = rows.double().T @ rows.double(), _zeros(width)
            gram.add_gram_(total, [rows])
            gram.mirror_(total)
            found.append(float((total - truth).norm() / truth.norm()))
    return max(found)


def _zeros(width: int) -> Tensor:
    return torch.zeros(width, width, dtype=torch.float64)


def runs_of_small_sums() -> None:
    """Print times and errors of sums that are added to as a whole, by the rows that one product adds up."""
    print("| rows × width | threads |", *(f"{run} |" for run in RUNS))
    print("| --- | --- |", *("--- |" for _ in RUNS))
    default = gram._SHORT_RUN
    for label, width, taken in _sums(SMALL):
        cells = []
        for run in RUNS:
            gram._SHORT_RUN = run
            cells.append(f"{taken():.2f} ({worst(width):.1e}) |")
        print(label, *cells, flush=True)
    gram._SHORT_RUN = default


def _sums(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int, Callable[[], float]]]:
    """The head of a row, the width, and what measures the milliseconds of a sum, for each size and number of threads."""
    for n, width in sizes:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows, total = torch.randn(n, width), _zeros(width)
            add = partial(gram.add_gram_, total, [rows])
            yield f"| {n:,} × {width} | {threads} |", width, partial(least, add)


def order_of_rows() -> None:
    """Print what it costs wide sums to look for small rows and to move them, and what they lose without."""
    print(
        "| rows × width | threads | not looked for (error) | looked for | moved (error) |",
        "| --- | --- | --- | --- | --- |",
        sep="\n",
    )
    loses = small_rows.loses
    for label, width, taken in _sums(WIDE):
        cells = []
        for decide in (lambda sizes: False, loses, lambda sizes: bool(loses(sizes)) or True):
            small_rows.loses = decide
            cells.append(f"{taken():.1f}" + ("" if decide is loses else f" ({worst(width):.1e})") + " |")
        print(label, *cells, flush=True)
    small_rows.loses = loses


def sums_over_patches() -> None:
    """Print times of sums over patches of 3 × 3 pixels padded by one, with the patches and by lagged products."""
    print(
        "| images, channels, pixels a side | threads | patches | lags | chosen |",
        "| --- | --- | --- | --- | --- |",
        sep="\n",
    )
    geometry = Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    for n, channels, side in IMAGES:
        x = torch.rand(n, channels, side, side).to(memory_format=torch.channels_last)
        total = _zeros(9 * channels)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plain = least(lambda x=x, t=total: _by_patches(t, x, geometry), 3)
            lags = least(lambda x=x, t=total: patch_gram.add_gram_of_patches_(t, x, geometry, 1.0), 3)
            chosen = "lags" if patch_gram.pays(geometry, x) else "patches"
            print(f"| {n}, {channels}, {side} | {threads} | {plain:.1f} | {lags:.1f} | {chosen} |", flush=True)


def _by_patches(total: Tensor, x: Tensor, geometry: Geometry) -> None:
    size = total.shape[1] * geometry.positions(x.shape[2:])
    for part in x.split(max(1, max(kron._PATCHES, kron._ROWS // 2 * total.shape[1]) // size)):
        gram.add_gram_of_positions_(total, [geometry.patches(part)])


if __name__ == "__main__":
    with keeping_freed:  # as a fit does
        runs_of_small_sums()
        print()
        order_of_rows()
        print()
        sums_over_patches()
