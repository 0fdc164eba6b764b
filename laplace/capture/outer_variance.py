r"""Predictive variance of a layer whose rows are sums of outer products over positions, :math:`\sum_r g_{cr} a_r^\top`.

With the variances :math:`w_{oi}` of the weight's entries in some bases, in which :math:`g` and :math:`a` are given,

.. math:: v_{cd} = \sum_{oi} w_{oi} \Bigl(\sum_r g_{cro} a_{ri}\Bigr) \Bigl(\sum_s g_{dso} a_{si}\Bigr)
                 = \sum_{rs} \sum_o g_{cro}\, g_{dso} \sum_i w_{oi}\, a_{ri} a_{si} .

The first form makes the rows of all outputs, and costs as many times more as there are outputs; the second needs the weight
once for every pair of positions, whatever the number of outputs. Which of them is cheaper follows from the shapes. Where
the pairs of different positions cancel those of equal ones, the second form has lost digits that the first one keeps, and the
first one is taken. The rows themselves may be turned into the bases, :math:`Q_B^\top (\sum_r g_{cr} a_r^\top) Q_A`, which takes
fewer operations than turning each :math:`g_{cr}` or :math:`a_r` where positions are many, as in a network's first convolutions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace.capture.blocks import Basis
from laplace.linalg.matmul import batched, product, times_transposed
from laplace.linalg.memory import at_once, ranges

Inputs = Callable[[int, int], Tensor]
Weight = Callable[[int], Tensor]

_PAIRS = 1 << 21  # elements of products of pairs that are held at once
_TILE = 1 << 18  # elements of rows that are held at once: what a processor's cache holds
_WEIGHTS = 1 << 24  # elements of weights that are held at once
_CANCELLED = 1 / 64  # share of the pairs of equal positions below which others cancel them
_TRAFFIC = 16  # multiplications in whose time an element of a row is written, squared and read again


def add_outer_variance(
    total: Tensor, inputs: Inputs, g: Tensor, basis: Basis, weight: Weight, shape: torch.Size, diagonal: bool
) -> None:
    """Add the variances of one weight ``(out, in)`` for several priors.

    Args:
        total: ``(priors, batch, outputs)`` if ``diagonal`` else ``(priors, batch, outputs, outputs)``.
        inputs: From a range of examples to ``(examples, positions, in)``.
        g: Output gradients ``(batch, outputs, positions, out)``.
        basis: In which the covariance is diagonal.
        weight: From the number of a prior to its variances ``(out, in)`` in the basis.
        shape: ``(positions, in)`` of the inputs.
        diagonal: Add the variances of the outputs alone instead of their covariance.
    """
    (_, outputs, positions, out), width = g.shape, shape[1]
    pairs, others = positions * (positions + 1) // 2, 1 if diagonal else outputs
    by_pairs = len(total) * pairs
    by_rows = outputs * (positions + _TRAFFIC + len(total) * others)
    cheap = by_pairs <= by_rows
    step = pairs * max(width, outputs * out) if cheap else positions * width
    first, last = (basis, Basis()) if cheap else _split(basis, outputs, positions, out, width)
    for start, stop in ranges(len(g), step, at_once(_PAIRS, g.device)):
        a, part, area = (
            project(inputs(start, stop), first.right),
            project(g[start:stop], first.left),
            total[:, start:stop],
        )
        found = _by_pairs(a, part, weight, len(total), diagonal) if cheap else None
        if found is None:
            _add_rows(area, a, part, last, weight, diagonal)
        else:
            area += found


def project(values: Tensor, basis: Tensor | None) -> Tensor:
    """Values ``(…, width)`` in a basis, in the same order in memory; None stands for the identity."""
    if basis is None:
        return values
    if values.ndim == 4 and not values.is_contiguous():
        return product(values.transpose(1, 2), basis.to(values.dtype)).transpose(1, 2)
    return product(values, basis.to(values.dtype))


def _split(basis: Basis, outputs: int, positions: int, out: int, width: int) -> tuple[Basis, Basis]:
    """The bases into which gradients and inputs are turned, and those into which rows are, whichever takes fewer operations."""
    if outputs * out * width > _PAIRS:
        return basis, Basis()
    left, right = positions > width, positions > outputs * out
    first = Basis(None if left else basis.left, None if right else basis.right)
    return first, Basis(basis.left if left else None, basis.right if right else None)


def _by_pairs(a: Tensor, g: Tensor, weight: Weight, priors: int, diagonal: bool) -> Tensor | None:
    """The variances from the pairs of positions; None where they cancel."""
    positions = a.shape[1]
    r, s = torch.triu_indices(positions, positions, 1, device=a.device)
    products, squares = _pairs(a, 1, r, s), _pairs(g, 2, r, s)  # (batch, pairs, in), (batch, outputs, pairs, out)
    found, kept = [], torch.ones((), dtype=torch.bool, device=a.device)
    for t in range(priors):
        scale = product(products, weight(t).to(g.dtype).T)  # (batch, pairs, out)
        variances = equal = _dot(squares[:, :, :positions], scale[:, :positions])
        if positions > 1:
            variances = equal + 2 * _dot(squares[:, :, positions:], scale[:, positions:])
            kept &= (variances >= _CANCELLED * equal).all()
        found.append(variances if diagonal else _covariance(g, r, s, scale))
    return torch.stack(found) if kept else None


def _pairs(values: Tensor, dim: int, r: Tensor, s: Tensor) -> Tensor:
    """Products of equal positions, and of those numbered ``r`` and ``s``."""
    equal = values.square()
    return torch.cat((equal, values.index_select(dim, r) * values.index_select(dim, s)), dim) if len(r) else equal


def _covariance(g: Tensor, r: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    equal, half = scale.split([scale.shape[1] - len(r), len(r)], 1)
    total = torch.bmm((g * equal[:, None]).flatten(2), g.flatten(2).mT)
    half = torch.bmm((g[:, :, r] * half[:, None]).flatten(2), g[:, :, s].flatten(2).mT)
    return total + half + half.mT


def _dot(squares: Tensor, scale: Tensor) -> Tensor:
    return torch.bmm(squares.flatten(2), scale.flatten(1)[:, :, None])[:, :, 0]


def _add_rows(total: Tensor, a: Tensor, g: Tensor, basis: Basis, weight: Weight, diagonal: bool) -> None:
    (_, outputs, _, out), width = g.shape, a.shape[2]
    g = g.transpose(2, 3)  # (batch, outputs, out, positions)
    held = at_once(_TILE, g.device)
    tile = out * width if basis.left is not None else held // 8
    for first, last in ranges(len(total), out * width, at_once(_WEIGHTS, g.device)):
        weights = torch.stack([weight(t).to(g.dtype) for t in range(first, last)])  # (priors, out, in)
        for o, p in ranges(out, width, tile):
            columns = weights[:, o:p].flatten(1)
            for start, stop in ranges(len(g), outputs * columns.shape[1], held):
                part = g[start:stop, :, o:p].flatten(1, 2)
                rows = project(batched(part, a[start:stop]), basis.right).view(stop - start, outputs, p - o, width)
                rows = rows if basis.left is None else project(rows.mT, basis.left).mT
                rows = rows.flatten(2)
                area = total[first:last, start:stop]
                if diagonal:
                    area += times_transposed(rows.square_(), columns).permute(2, 0, 1)
                else:
                    for t in range(len(area)):
                        area[t] += torch.bmm(rows * columns[t], rows.mT)
