r"""Lagged products :math:`S_\delta = \sum_q x_q x_{q+\delta}^\top` of values on a grid, for all lags up to a reach.

The places of the grid are rows, one after the other, with so many rows of zeros behind each of its lines that no lag leads from
one into another. A lag is then a number of rows, and what a run of rows is multiplied by, at all lags at once, is copied from a
few pieces of memory. :math:`S_{-\delta} = S_\delta^\top` is not computed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace.linalg.matmul import add_times_transposed_
from laplace.linalg.precision import in_full_precision
from laplace.linalg.small_rows import RUN, order_of

_TOGETHER = (
    8 * RUN
)  # rows that are added up before they go into a sum in float64: what is taken off at edges leaves the error


@dataclass(frozen=True)
class _Line:
    """Lags that differ along the last axis alone.

    Attributes:
        lags: All of them.
        ahead: How many rows the first leads ahead.
        step: Rows from one to the next.
    """

    lags: list[tuple[int, ...]]
    ahead: int
    step: int

    def windows(self, rows: Tensor, start: int, n: int) -> Tensor:
        """What ``n`` of the rows are multiplied by, ``(n, lags · width)``."""
        width = rows.shape[1]
        shape, strides = (n, len(self.lags), width), (width, self.step * width, 1)
        return rows.as_strided(shape, strides, (start + self.ahead) * width).flatten(1)


@in_full_precision()
def lagged_products(x: Tensor, reach: Sequence[int], step: Sequence[int]) -> Tensor:
    """``Σ_q x[q] x[q + lag · step]ᵀ`` over all places ``q`` of a grid and all examples; outside of the grid are zeros.

    Args:
        x: ``(batch, width, …)``, with the axes of the grid last.
        reach: The largest lag along every axis.
        step: Places that a lag of one is, along every axis.

    Returns:
        Float64, ``(2 · reach + 1, …, width, width)``, with the lag of zero in the middle.
    """
    width = x.shape[1]
    rows, places, strides = _as_rows(x, [r * s for r, s in zip(reach, step, strict=True)])
    lines = list(_lines(reach, step, strides))
    total = torch.zeros(width, products(reach) * width, dtype=torch.float64, device=x.device)
    _add_up_(total, lines, rows, places)
    found = total.new_zeros(*(2 * r + 1 for r in reach), width, width)
    lags = (lag for line in lines for lag in line.lags)
    for lag, product in zip(lags, total.view(width, -1, width).unbind(1), strict=True):
        found[tuple(r - part for r, part in zip(reach, lag, strict=True))] = product.T
        found[tuple(r + part for r, part in zip(reach, lag, strict=True))] = product
    return found


def products(reach: Sequence[int]) -> int:
    """How many products of two rows are made for every place."""
    lines = torch.Size(2 * r + 1 for r in reach[:-1]).numel()
    return lines // 2 * (2 * reach[-1] + 1) + reach[-1] + 1


def _as_rows(x: Tensor, room: list[int]) -> tuple[Tensor, int, list[int]]:
    """Values as rows in one piece of memory, how many of these are places, and how far apart neighbours along an axis are."""
    n, width, *sizes = x.shape
    sides = [size + extra for size, extra in zip(sizes, room, strict=True)]
    strides = [torch.Size(sides[axis + 1 :]).numel() for axis in range(len(sides))]
    places = n * torch.Size(sides).numel()
    rows = x.new_zeros(places + sum(extra * stride for extra, stride in zip(room, strides, strict=True)), width)
    grid = rows[:places].view(n, *sides, width)
    grid[(slice(None), *map(slice, sizes))] = x.movedim(1, -1)
    return rows, places, strides


def _lines(reach: Sequence[int], step: Sequence[int], strides: Sequence[int]) -> Iterator[_Line]:
    """Half of all lags: those of which the first number that is not zero is positive, and zero."""
    for lag in itertools.product(*(range(-r, r + 1) for r in reach[:-1])):
        if lag < (0,) * len(lag):
            continue
        lags = [(*lag, number) for number in range(-reach[-1] if any(lag) else 0, reach[-1] + 1)]
        ahead = sum(number * s * stride for number, s, stride in zip(lags[0], step, strides, strict=True))
        yield _Line(lags, ahead, step[-1])


def _add_up_(total: Tensor, lines: list[_Line], rows: Tensor, places: int) -> None:
    """Add the sums at all lags of the lines, side by side."""
    squares = rows.square().sum(1)[:, None]
    for start in range(0, places, _TOGETHER):
        left = rows[start : min(start + _TOGETHER, places)]
        right = torch.cat([line.windows(rows, start, len(left)) for line in lines], 1)
        others = sum(line.windows(squares, start, len(left)).sum(1) for line in lines)
        if (order := order_of((squares[start : start + len(left), 0] * others).sqrt())) is not None:
            left, right = left.index_select(0, order), right.index_select(0, order)
        product: Tensor | None = None
        for one, other in zip(left.split(RUN), right.split(RUN), strict=True):
            product = add_times_transposed_(product, one.T.contiguous(), other.T)
        total += product
