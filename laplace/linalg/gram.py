r"""Sums :math:`\sum_n l_n r_n^\top` of many rows that lose no small row.

Added one by one in float32, a row that is small next to the sum so far vanishes. Here, at most ``RUN`` rows in a row are
added up by one product in the rows' own type, from zero, the small ones before the large ones where it matters; the results of
a few such runs are added up next, and those go into a running sum in float64, block by block, so that no temporary of the
sum's size is made. In float32 the relative error stays below 2e-6 for rows of any sizes in any order.

Symmetric sums wider than a block are computed on and left of the block diagonal only; :func:`mirror_` completes them.

A sum may be kept in part: as its rows ``a`` to ``b`` and their columns up to ``b``, of shape ``(b - a, b)``, which says which
rows they are. Where ``a`` and ``b`` are multiples of :data:`BLOCK`, or ``b`` is the end, every row has the bits that it has in
the whole sum: what is multiplied at once are the rows of one block, whatever else there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from laplace.linalg import gram_gpu
from laplace.linalg.matmul import add_times_transposed_, turned
from laplace.linalg.precision import in_full_precision
from laplace.linalg.small_rows import RUN, small_first, small_first_in_runs

_RUNS = 32  # results of products that are added up before they go into the running sum
_SHORT_RUN = 28  # rows that one product adds up for a small sum, where products are cheap
BLOCK = 192  # rows of a block of a sum
_WEIGHTED_BLOCK = BLOCK // 2  # of a weighted sum in float64: less of it is made twice
_SMALL = 1 << 14  # elements up to which a sum is small
_SCRATCH = 1 << 19  # elements of the products of short runs that are held at once
_POSITIONS = 64  # width up to which per-example Gram matrices are cheaper than a transposed copy


@in_full_precision()
def add_gram_(total: Tensor, rows: Sequence[Tensor], scale: float = 1.0, exact: bool = False) -> None:
    """Add ``scale · Σ rowsᵀ rows`` to a symmetric float64 sum; beyond one block, only on and left of the block diagonal.

    Args:
        total: The sum ``(width, width)``, or some of its rows.
        rows: Matrices ``(n, width)``; a few with some thousand rows in all cost less than one after the other.
        scale: Factor of all of them.
        exact: Multiply in float64: the sum then has the rank of the rows, where rounded products have full rank.
    """
    if total.is_cuda:
        gram_gpu.add_gram_(total, rows, scale, exact)
        return
    if is_small(total):
        for r in rows:
            r = r.double() if exact else r
            _add_to_small_(total, r, r, scale)
        return
    if not exact:
        rows = [small_first(r)[0] for r in rows]
    for runs in _turned_runs(rows, exact):
        _add_gram_of_runs_(total, runs, scale)


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


@in_full_precision()
def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``leftᵀ right`` to a float64 sum ``(a, b)``, of rows ``(n, a)`` and ``(n, b)``."""
    if total.is_cuda:
        gram_gpu.add_product_(total, left, right)
        return
    if total.numel() <= _SMALL:
        _add_to_small_(total, left, right)
        return
    left, right = small_first(left, right)
    for runs in zip(_turned_runs([left]), _turned_runs([right]), strict=True):
        for start, stop in _blocks(len(total)):
            _add_to_block_(total[start:stop], ((one[:, start:stop], other) for one, other in zip(*runs, strict=True)))


def weighted_gram(rows: Tensor, weights: Tensor, both: bool = True) -> Iterator[tuple[int, int, Tensor]]:
    """``Σ wₙ rₙ rₙᵀ`` in pieces, each with its first row and column; everything is of float64, weights may be negative.

    Args:
        rows: ``(n, width)``.
        weights: ``(n,)``.
        both: Give what is right of the block diagonal too, which is what is left of it, transposed.
    """
    width, weights = rows.shape[1], weights[:, None]
    if width**2 <= _SMALL:
        yield 0, 0, (rows * weights).T @ rows
        return
    for start, stop in _blocks(width, _WEIGHTED_BLOCK):
        product = (rows[:, start:stop] * weights).T @ rows[:, :stop]
        yield start, 0, product
        if both and start:
            yield 0, start, product[:, :start].T


def mirror_weighted_(total: Tensor) -> None:
    """Copy what is left of the block diagonal of a whole sum of :func:`weighted_gram` to right of it."""
    if total.numel() > _SMALL:
        for start, stop in _blocks(len(total), _WEIGHTED_BLOCK):
            total[start:stop, stop:] = total[stop:, start:stop].T


def complete_blocks_(total: Tensor) -> None:
    """Copy what is left of the diagonal to above it, inside the blocks on the diagonal, which :func:`mirror_` leaves alone."""
    for rows, start, stop in blocks_of_rows(total):
        block = rows[:, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)


@in_full_precision()
def add_gram_of_positions_(total: Tensor, values: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add the Gram matrices of tensors ``(batch, positions, width)``, as :func:`add_gram_` does.

    Channels-first memory of convolutions is not transposed where that costs more than it saves.
    """
    if total.is_cuda:
        gram_gpu.add_gram_(total, values, scale, exact=False)
        return
    rows = []
    for value in values:
        width = value.shape[2]
        if value.stride(2) == 1:
            rows.append(value.reshape(-1, width))
        elif width <= _POSITIONS:
            for part in value.split(_SHORT_RUN, 1):
                total.add_(torch.bmm(part.mT, part).sum(0), alpha=scale)
        elif is_small(total) or (runs := _runs_of_positions(value)) is None:
            rows.append(value.permute(2, 0, 1).reshape(width, -1).T)
        else:
            for some in runs.split(_RUNS):
                _add_gram_of_runs_(total, [some], scale)
    add_gram_(total, rows, scale)


def mirror_(total: Tensor) -> None:
    """Copy what is left of the block diagonal of a symmetric sum, or of some of its rows, to above it."""
    first = total.shape[1] - total.shape[0]
    if not is_small(total):
        for block, start, stop in blocks_of_rows(total):
            block[:, stop:] = total[stop - first :, start:stop].T


def is_small(total: Tensor) -> bool:
    """Whether a symmetric sum is so small that it is added to as a whole; of such sums there are no parts."""
    return total.shape[1] ** 2 <= _SMALL


def blocks_of_rows(total: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """The blocks of rows of a symmetric sum, or of a part of it, each with its first row and one past its last."""
    last = total.shape[1]
    first = last - total.shape[0]
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        yield total[start - first : stop - first], start, stop


def _blocks(n: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, n)) for start in range(0, n, size))


def _turned_runs(rows: Sequence[Tensor], exact: bool = False) -> Iterator[list[Tensor]]:
    """Runs of rows, ``(runs, width, run)``, as many at once as are added up before they go into the running sum."""
    chunk, room = [], _RUNS
    for runs in (runs for r in rows for runs in _runs(r)):
        while len(runs):
            some, runs = runs[:room], runs[room:]
            chunk.append(turned(some.double() if exact else some, BLOCK))
            room -= len(some)
            if not room:
                yield chunk
                chunk, room = [], _RUNS
    if chunk:
        yield chunk


def _runs(rows: Tensor) -> Iterator[Tensor]:
    """Rows ``(n, width)`` by runs, ``(runs, run, width)``, and what is left of them."""
    whole = len(rows) // RUN * RUN
    yield rows[:whole].unflatten(0, (-1, RUN))
    if whole < len(rows):
        yield rows[None, whole:]


def _runs_of_positions(value: Tensor) -> Tensor | None:
    """Runs of rows, ``(runs, width, run)``, of values ``(batch, positions, width)`` in channels-first memory, by one copy.

    Returns:
        None where a run is not of whole examples, nor an example of whole runs.
    """
    n, positions, width = value.shape
    if positions % RUN == 0:
        runs = value.mT.unflatten(2, (-1, RUN)).transpose(1, 2)
    elif n * positions % RUN == 0 and RUN % positions == 0:
        runs = value.mT.unflatten(0, (-1, RUN // positions)).transpose(1, 2)
    else:
        return None
    return small_first_in_runs(runs.reshape(-1, width, RUN))


def _add_gram_of_runs_(total: Tensor, runs: list[Tensor], scale: float) -> None:
    """Add the Gram matrix of runs of rows, ``(runs, width, run)`` each, on and left of the block diagonal."""
    for block, start, stop in blocks_of_rows(total):
        _add_to_block_(block[:, :stop], ((some[:, start:stop], some[:, :stop]) for some in runs), scale)


def _add_to_block_(block: Tensor, runs: Iterable[tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
    """Add ``Σ left rightᵀ`` to a block of a sum."""
    product: Tensor | None = None  # a buffer, and not the block itself, so that what is around the block changes no bit
    for left, right in runs:
        product = add_times_transposed_(product, left, right)
    block.add_(product, alpha=scale)


def _add_to_small_(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add ``leftᵀ right`` to a small sum: one product for each run of rows, many at once."""
    whole = len(left) // _SHORT_RUN * _SHORT_RUN
    step = _SHORT_RUN * max(1, _SCRATCH // max(1, total.numel()))
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        runs = (t[start:stop].unflatten(0, (-1, _SHORT_RUN)) for t in (left, right))
        total.add_(torch.bmm(next(runs).mT, next(runs)).sum(0), alpha=scale)
    if whole < len(left):
        total.add_(left[whole:].T @ right[whole:], alpha=scale)
