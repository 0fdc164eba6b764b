r"""Sums :math:`\sum_n l_n r_n^\top` of many rows that lose no small row.

Added one by one in float32, a row that is small next to the sum so far vanishes. Here, at most ``_RUN`` rows in a row are
added up by one product in the rows' own type, from zero; the results of a few such runs are added up next, and those go into
a running sum in float64, block by block, so that no temporary of the sum's size is made. In float32 the relative error stays
below 2e-6 for rows of any sizes in any order.

Symmetric sums wider than a block are computed on and above the block diagonal only; :func:`mirror_` completes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_RUN = 128  # rows that one product adds up
_RUNS = 32  # results of products that are added up before they go into the running sum
_SHORT_RUN = 32  # rows that one product adds up for a small sum, where products are cheap
_BLOCK = 192  # rows of a block of a sum
_WEIGHTED = 128  # rows of a block of a weighted sum, which products are added to where it is
_SMALL = 1 << 14  # elements up to which a sum is small
_SCRATCH = 1 << 19  # elements of the products of short runs that are held at once
_POSITIONS = 64  # width up to which per-example Gram matrices are cheaper than a transposed copy


def add_gram_(total: Tensor, rows: Sequence[Tensor], scale: float = 1.0, exact: bool = False) -> None:
    """Add ``scale · Σ rowsᵀ rows`` to a symmetric float64 sum; beyond one block, only on and above the block diagonal.

    Args:
        total: The sum ``(width, width)``.
        rows: Matrices ``(n, width)``; a few with some thousand rows in all cost less than one after the other.
        scale: Factor of all of them.
        exact: Multiply in float64: the sum then has the rank of the rows, where rounded products have full rank.
    """
    if total.numel() <= _SMALL:
        for r in rows:
            r = r.double() if exact else r
            _add_to_small_(total, r, r, scale)
        return
    for start, stop in _blocks(len(total)):
        _add_to_block_(total[start:stop, start:], [(r[:, start:stop], r[:, start:]) for r in rows], scale, exact)


def gram(rows: Iterable[Tensor]) -> Tensor:
    """``Σ rowsᵀ rows`` of one or more matrices ``(n, width)``, added up in float64 and rounded to their type."""
    total: Tensor | None = None
    for r in rows:
        if total is None:
            total = torch.zeros(r.shape[1], r.shape[1], dtype=torch.float64, device=r.device)
        add_gram_(total, [r])
    assert total is not None, "there is at least one direction"
    mirror_(total)
    return total.to(r.dtype)


def sum_of_squares(rows: Iterable[Tensor]) -> Tensor:
    """The diagonal of :func:`gram`, ``(width,)``."""
    total: Tensor | None = None
    for r in rows:
        square = r.square().sum(0)  # torch adds these up in pairs
        total = square.double() if total is None else total.add_(square)
    assert total is not None, "there is at least one direction"
    return total.to(r.dtype)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``leftᵀ right`` to a float64 sum ``(a, b)``, of rows ``(n, a)`` and ``(n, b)``."""
    if total.numel() <= _SMALL:
        _add_to_small_(total, left, right)
        return
    for start, stop in _blocks(len(total)):
        _add_to_block_(total[start:stop], [(left[:, start:stop], right)])


def add_weighted_gram_(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Add ``Σ wₙ rₙ rₙᵀ`` to what is on and above the block diagonal of a float64 matrix.

    Args:
        total: The sum ``(width, width)``.
        rows: ``(n, width)``, float64.
        weights: ``(n,)``, float64; they may be negative.
    """
    weighted = (rows * weights[:, None]).T
    for start, stop in _blocks(len(total), _WEIGHTED):
        total[start:stop, start:].addmm_(weighted[start:stop], rows[:, start:])


def mirror_whole_(total: Tensor) -> None:
    """Copy what is above the diagonal of a symmetric sum to below it."""
    for start, stop in _blocks(len(total)):
        block = total[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).mT)
        total[stop:, start:stop] = total[start:stop, stop:].T


def add_gram_of_positions_(total: Tensor, values: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add the Gram matrices of tensors ``(batch, positions, width)``, as :func:`add_gram_` does.

    Channels-first memory of convolutions is not transposed where that costs more than it saves.
    """
    width = len(total)
    rows = []
    for value in values:
        if value.stride(2) == 1:
            rows.append(value.reshape(-1, width))
        elif width <= _POSITIONS:
            for part in value.split(_RUN, 1):
                total.add_(torch.bmm(part.mT, part).sum(0), alpha=scale)
        else:
            rows.append(value.permute(2, 0, 1).reshape(width, -1).T)
    add_gram_(total, rows, scale)


def mirror_(total: Tensor) -> None:
    """Copy what is above the block diagonal of a symmetric sum to below it."""
    if total.numel() > _SMALL:
        for start, stop in _blocks(len(total)):
            total[stop:, start:stop] = total[start:stop, stop:].T


def _blocks(n: int, size: int = _BLOCK) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, n)) for start in range(0, n, size))


def _add_to_block_(
    block: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], scale: float = 1.0, exact: bool = False
) -> None:
    """Add ``Σ leftᵀ right`` to a block of a sum, by runs of rows in a buffer of the block's size."""
    runs = [run for left, right in pairs for run in zip(left.split(_RUN), right.split(_RUN), strict=True)]
    if exact:
        for left, right in runs:
            block.addmm_(left.double().T, right.double(), alpha=scale)
        return
    for first in range(0, len(runs), _RUNS):
        left, right = runs[first]
        product = left.T @ right
        for left, right in runs[first + 1 : first + _RUNS]:
            product.addmm_(left.T, right)
        block.add_(product, alpha=scale)


def _add_to_small_(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add ``leftᵀ right`` to a small sum: one product for each run of rows, many at once."""
    whole = len(left) // _SHORT_RUN * _SHORT_RUN
    step = _SHORT_RUN * max(1, _SCRATCH // total.numel())
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        runs = (t[start:stop].unflatten(0, (-1, _SHORT_RUN)) for t in (left, right))
        total.add_(torch.bmm(next(runs).mT, next(runs)).sum(0), alpha=scale)
    if whole < len(left):
        total.add_(left[whole:].T @ right[whole:], alpha=scale)
