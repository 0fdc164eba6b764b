r"""Rows in an order in which runs of them lose no small one.

A product of float32 matrices adds its terms one after the other. Where a large term comes first, each later one that is below
the spacing of floats beside it is lost, up to all of them: 127 rows of :math:`6 \cdot 10^{-8}` of the first would add
:math:`7.5 \cdot 10^{-6}` to it. With the small ones first, their sum is as exact as any.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RUN = 128  # rows that one product adds up
_SMALL = 2.0**-9  # of what a run adds up to: rows well below the mean one
_LOST = 2.0**-24  # of it: as much of a float32 term may be lost
_BOUND = 4e-7  # of all rows: what may be lost before they are sorted


def order_of(sizes: Tensor) -> Tensor | None:
    """The order of rows with these sizes of their outer products in which none is lost; None for the one in which they are."""
    return sizes.argsort(stable=True) if loses(sizes) else None


def small_first(*rows: Tensor) -> tuple[Tensor, ...]:
    """The same rows of one matrix ``(n, width)`` or of two, of which products are to be added up by runs.

    Returns:
        The matrices as they are, unless these are of float32 and small rows would be lost: then sorted by size.
    """
    order = order_of(_sizes(rows)) if rows[0].dtype == torch.float32 else None
    return rows if order is None else _moved(rows, order)


def small_first_in_runs(runs: Tensor) -> Tensor:
    """Runs ``(runs, width, RUN)`` of the same rows, as :func:`small_first` has them."""
    order = order_of(runs.square().sum(1).flatten()) if runs.dtype == torch.float32 else None
    if order is None:
        return runs
    columns = runs.transpose(0, 1).reshape(runs.shape[1], -1).index_select(1, order)
    return columns.unflatten(1, (-1, RUN)).transpose(0, 1).contiguous()


def by_size(*rows: Tensor) -> tuple[Tensor, ...]:
    """The same rows of one matrix ``(n, width)`` or of two, those first of which the outer product is small."""
    return _moved(rows, _sizes(rows).argsort(stable=True))


def _sizes(rows: tuple[Tensor, ...]) -> Tensor:
    return torch.linalg.vector_norm(rows[0], dim=1) * torch.linalg.vector_norm(rows[-1], dim=1)


def _moved(rows: tuple[Tensor, ...], order: Tensor) -> tuple[Tensor, ...]:
    """The rows in another order, each matrix in memory of the kind that it is in."""
    return tuple(
        matrix.index_select(0, order) if matrix.is_contiguous() else matrix.T.index_select(1, order).T
        for matrix in rows
    )


def loses(sizes: Tensor) -> bool:
    """Whether the sum of runs of rows with these sizes of their outer products, one run after the other, loses small ones."""
    values = sizes.detach().cpu().double().numpy()  # on the host, where decisions wait for no device
    runs = np.pad(values, (0, -len(values) % RUN)).reshape(-1, RUN)
    sums = runs.sum(1, keepdims=True)
    lost = np.minimum(runs, _LOST * sums, where=runs < _SMALL * sums, out=np.zeros_like(runs))
    return bool(lost.sum() > _BOUND * sums.sum())
