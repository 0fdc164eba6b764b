r"""Sums of products of many rows on GPUs, as :mod:`laplace.linalg.gram` has them: few calls of kernels that are large.

What costs on a GPU is the number of kernels, not what a cache holds. Where it multiplies in float64 about as fast as in
float32, as the chips of data centres do, the rows are converted and multiplied as they are, so that nothing is lost at all: on
an H100 that takes less time than one product in float32. Elsewhere, runs of rows, the small ones before the large ones, are
multiplied side by side in float32, and added up in float64. Which of the two is a matter of the chip alone, so that bits are.

Of symmetric sums, what is on and left of the block diagonal is multiplied by blocks of rows. Where only some rows of a block
are held, the whole block is multiplied: its rows then have the bits that they have in the whole sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from laplace.linalg.small_rows import RUN, by_size

BLOCK = 384  # rows of a block of a symmetric sum
_TILE = 128  # rows and columns of a result that one of a chip's processors works on
_TILES = 160  # of these, what keeps all processors of a large chip busy
_SHARE = 512  # rows that are worth a share of the processors
_ELEMENTS = 1 << 26  # of converted rows and of products side by side, that are held at once
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities: P100, V100, A100, H100, B200


def add_gram_(total: Tensor, rows: Sequence[Tensor], scale: float, exact: bool) -> None:
    """Add ``scale · Σ rowsᵀ rows`` as :func:`laplace.linalg.gram.add_gram_` does, of rows ``(…, width)``."""
    last = total.shape[1]
    first = last - total.shape[0]
    for matrix in rows:
        width = matrix.shape[-1]
        for (part,) in _parts((matrix,), exact):
            for start in range(first // BLOCK * BLOCK, last, BLOCK):
                stop = min(start + BLOCK, width)
                top, bottom, right = max(start, first), min(stop, last), min(stop, last)
                place = total[top - first : bottom - first, :right]
                for product in _products(part[:, start:stop], part[:, :stop]):
                    place.add_(product[top - start : bottom - start, :right], alpha=scale)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``leftᵀ right`` to a float64 sum ``(a, b)``, of rows ``(n, a)`` and ``(n, b)``."""
    for one, two in _parts((left, right)):
        for product in _products(one, two):
            total.add_(product)


def _parts(matrices: tuple[Tensor, ...], exact: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """The rows ``(…, width)`` of matrices of one length, some at a time, in the type and order in which they are multiplied."""
    wide = exact or _is_fast(matrices[0].device)
    step = max(1, _ELEMENTS // max(1, *(matrix[:1].numel() for matrix in matrices)))
    for pieces in zip(*(matrix.split(step) for matrix in matrices), strict=True):
        kinds = (torch.float64 if wide else piece.dtype for piece in pieces)
        found = tuple(
            piece.to(kind, memory_format=torch.contiguous_format).flatten(0, -2)
            for piece, kind in zip(pieces, kinds, strict=True)
        )
        yield (
            by_size(*found) if found[0].dtype == torch.float32 else found
        )  # whether it matters would have to be waited for


def _products(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """``leftᵀ right`` in terms that are to be added up in float64."""
    n, each = len(left), left.shape[1] * right.shape[1]
    if n == 0:
        return
    if left.dtype == torch.float64:
        shares = _shares(n, left.shape[1], right.shape[1])
        run, step = n // shares, shares
    else:
        run, step = min(RUN, n), max(1, _ELEMENTS // each)
    whole = n // run * run
    for start in range(0, whole, step * run):
        stop = min(start + step * run, whole)
        if stop - start == run:
            yield left[start:stop].T @ right[start:stop]
            continue
        one, two = (rows[start:stop].unflatten(0, (-1, run)) for rows in (left, right))
        yield torch.bmm(one.mT, two).sum(0, dtype=torch.float64)
    if whole < n:
        yield left[whole:].T @ right[whole:]


def _shares(n: int, rows: int, columns: int) -> int:
    """In how many shares of the rows a product is computed side by side, so that small results keep a chip busy too."""
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    return max(1, min(_TILES // tiles, n // _SHARE))


@lru_cache
def _is_fast(device: torch.device) -> bool:
    """Whether a device multiplies matrices of float64 at about half the rate of float32 at least."""
    return torch.cuda.get_device_capability(device) in _FAST_FLOAT64
