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
from laplace.capture.every_output import OutputGradients
from laplace.capture.weights import ALL, Weight
from laplace.linalg.matmul import batched, is_faster, product, times_transposed
from laplace.linalg.memory import at_once, ranges

Inputs = Callable[[int, int], Tensor]
Add = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]

_PAIRS = 1 << 21  # elements of gradients, or of products of pairs, that are held at once
_TILE = 1 << 20  # elements of rows, or of weights, that are held at once: few enough for a processor's cache
_WEIGHTS = 1 << 24  # elements of weights by which rows are multiplied
_HEIGHT = 40  # rows from which on a product with few columns is fast
_ONE_BY_ONE = 1 << 18  # multiplications from which on a call for each example pays
_RANGE = 1 << 13  # elements at a position from which on products of ranges pay
_GATHERED = (
    2  # time in which an element of a pair is gathered and multiplied, relative to that of one that lies in a row
)
_MULTIPLIED = 1 / 32  # time of a multiplication in a product of matrices, relative to the same
_CANCELLED = 1 / 64  # share of the pairs of equal positions below which others cancel them
_TRAFFIC = 16  # multiplications in whose time an element of a row is written, squared and read again


def add_outer_variance(
    total: Tensor,
    inputs: Inputs,
    g: OutputGradients,
    basis: Basis,
    weight: Weight,
    shape: torch.Size,
    diagonal: bool,
) -> None:
    """Add the variances of one weight ``(out, in)`` for several priors.

    Args:
        total: ``(priors, batch, outputs)`` if ``diagonal`` else ``(priors, batch, outputs, outputs)``.
        inputs: From a range of examples to ``(examples, positions, in)``.
        g: Output gradients ``(batch, outputs, positions, out)``.
        basis: In which the covariance is diagonal.
        weight: The variances in the basis.
        shape: ``(positions, in)`` of the inputs.
        diagonal: Add the variances of the outputs alone instead of their covariance.
    """
    (n, outputs, positions, out), width = g.shape, shape[1]
    pairs, others = positions * (positions + 1) // 2, 1 if diagonal else outputs
    by_pairs = len(total) * pairs
    by_rows = outputs * (positions + _TRAFFIC + len(total) * others)
    if by_pairs > by_rows:
        _add_by_rows(total, inputs, g, basis, weight, width, diagonal)
        return
    by_matrices = not diagonal or _multiplies_positions(len(total), outputs, positions)
    add, held = (_add_by_matrices_, positions) if by_matrices else (_add_by_squares_, pairs)
    for start, stop in ranges(n, max(pairs * width, held * outputs * out), at_once(_PAIRS, total.device)):
        a, part = project(inputs(start, stop), basis.right), project(g.of(start, stop), basis.left)
        found = _by_pairs(a, part, basis, weight, total.new_zeros(total[:, start:stop].shape), add)
        if found is not None:
            total[:, start:stop] += found
            continue
        for t, u in ranges(len(total), out * width, at_once(_WEIGHTS, total.device)):
            tiles = _tiles(weight, slice(t, u), part, width)
            _add_rows(total[t:u, start:stop], a, part, Basis(), tiles, diagonal)


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


def _multiplies_positions(priors: int, outputs: int, positions: int) -> bool:
    """Whether matrices of positions, made for each prior, cost less than the gradients' products at all pairs, made once."""
    matrices = priors * (_GATHERED * positions + outputs * (_MULTIPLIED * positions + 1))
    return positions > 1 and matrices < outputs * positions * _GATHERED


def _by_pairs(a: Tensor, g: Tensor, basis: Basis, weight: Weight, found: Tensor, add: Add) -> Tensor | None:
    """The variances from the pairs of positions, added to zeros of their shape; None where they cancel."""
    (a, columns), (g, rows) = _without_zeros(a, basis.right), _without_zeros(g, basis.left)
    (n, outputs, positions, out), priors = g.shape, len(found)
    r, s = _places(positions, a.device)
    products = _pairs(a, 1, r, s).flatten(0, 1)  # (batch · pairs, in)
    equal = g.new_zeros(priors, n, outputs)
    for first, last in ranges(out, priors * max(products.shape), at_once(_TILE, a.device)):
        part = g[..., first:last]
        weights = weight(
            ALL, slice(first, last) if rows is None else rows[first:last], ALL if columns is None else columns
        ).to(g.dtype)
        scale = times_transposed(products, weights.flatten(0, 1)).view(n, -1, priors, last - first).transpose(1, 2)
        add(found, equal, part, scale, r, s)  # (batch, priors, pairs, rows)
    variances = found if found.ndim == 3 else found.diagonal(dim1=-2, dim2=-1)
    if positions > 1 and not (variances >= _CANCELLED * equal).all():
        return None
    return found


def _add_by_squares_(found: Tensor, equal: Tensor, g: Tensor, scale: Tensor, r: Tensor, s: Tensor) -> None:
    """Add the variances ``(priors, batch, outputs)``, and what pairs of equal positions give, from products at all pairs."""
    squares, positions = _pairs(g, 2, r, s), g.shape[2]
    part = _dot(squares[:, :, :positions], scale[:, :, :positions])
    equal += part
    found += part
    if positions > 1:
        found.add_(_dot(squares[:, :, positions:], scale[:, :, positions:]), alpha=2)


def _add_by_matrices_(found: Tensor, equal: Tensor, g: Tensor, scale: Tensor, r: Tensor, s: Tensor) -> None:
    """Add the same, or covariances, from a symmetric matrix ``(positions, positions)`` for each row of the weight."""
    positions = g.shape[2]
    equal += _dot(g.square(), scale[:, :, :positions])
    place = r.new_empty(positions, positions)  # of a pair among all
    place[r, s] = place[s, r] = torch.arange(len(r), device=r.device)
    g = g.permute(0, 3, 1, 2).contiguous()  # batch, rows, outputs, positions
    for t in range(len(found)):
        matrices = scale[:, t].index_select(1, place.flatten()).unflatten(1, place.shape).permute(0, 3, 1, 2)
        weighted = g @ matrices
        if found.ndim == 3:
            found[t] += (weighted * g).sum((1, 3))
        else:
            found[t] += weighted.transpose(1, 2).flatten(2) @ g.transpose(1, 2).flatten(2).mT


def _places(positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the positions of all pairs: equal ones, then those that are one apart, and so on."""
    pairs = [(r, r + apart) for apart in range(positions) for r in range(positions - apart)]
    r, s = torch.tensor(pairs, device=device).T
    return r, s


def _pairs(values: Tensor, dim: int, r: Tensor, s: Tensor) -> Tensor:
    """Products of the pairs of :func:`_places` along a dimension; of many values in ranges, which gather nothing."""
    n = values.shape[dim]
    if n == 1:
        return values.square()
    if values.numel() < n * _RANGE:
        return values.index_select(dim, r) * values.index_select(dim, s)
    return torch.cat([values.narrow(dim, 0, n - d) * values.narrow(dim, d, n - d) for d in range(n)], dim)


def _without_zeros(values: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Values ``(batch, …, width)`` without what is zero everywhere, if that is much, and the numbers of what is left, or None.

    Units of a single example, or a few, that a ReLU has switched off are many; and where an image has become smaller than a
    kernel, most of the kernel's taps read padding.
    """
    if basis is not None:  # in which hardly anything is zero
        return values, None
    for part in (values[:1], values):
        live = (part != 0).flatten(0, -2).any(0).nonzero()[:, 0]
        if 4 * len(live) > 3 * values.shape[-1]:
            return values, None
    return values[..., live], live


def _dot(squares: Tensor, scale: Tensor) -> Tensor:
    """``(batch, outputs, …)`` times ``(batch, priors, …)``, added up over the rest, ``(priors, batch, outputs)``."""
    return torch.bmm(scale.flatten(2), squares.flatten(2).mT).transpose(0, 1)


def _add_by_rows(
    total: Tensor, inputs: Inputs, g: OutputGradients, basis: Basis, weight: Weight, width: int, diagonal: bool
) -> None:
    n, outputs, positions, out = g.shape
    first, last = _split(basis, outputs, positions, out, width)
    step = max(_high(outputs), at_once(_PAIRS, total.device) // (positions * max(width, outputs * out)))
    for t, u in ranges(len(total), out * width, at_once(_WEIGHTS, total.device)):
        tiles = None
        for start, stop in ranges(n, 1, step):
            a, part = project(inputs(start, stop), first.right).contiguous(), project(g.of(start, stop), first.left)
            if tiles is None:
                tiles = _tiles(weight, slice(t, u), part, width, out if last.left is not None else 1)
            _add_rows(total[t:u, start:stop], a, part, last, tiles, diagonal)


def _high(outputs: int) -> int:
    """Examples whose rows of all outputs make products with few columns fast."""
    return -(-_HEIGHT // outputs)


def _tiles(weight: Weight, priors: slice, g: Tensor, width: int, rows: int = 1) -> list[tuple[int, int, Tensor]]:
    """Ranges of a weight's rows, at least so many, and their variances, ``(priors, rows · in)``."""
    each = min(len(g), _high(g.shape[1])) * g.shape[1] * width
    found = []
    for first, last in ranges(g.shape[3], 1, max(rows, at_once(_TILE, g.device) // each)):
        found.append((first, last, weight(priors, slice(first, last), ALL).to(g.dtype).flatten(1)))
    return found


def _add_rows(
    total: Tensor, a: Tensor, g: Tensor, basis: Basis, tiles: list[tuple[int, int, Tensor]], diagonal: bool
) -> None:
    """Add the variances from the rows of a few examples."""
    n, outputs = g.shape[:2]
    for first, last, weights in tiles:
        step = max(_high(outputs), at_once(_TILE, g.device) // (outputs * weights.shape[1]))
        for start, stop in ranges(n, 1, step):
            part = g[start:stop, :, :, first:last]
            rows = _rows(a[start:stop], part, basis, diagonal)
            area = total[:, start:stop]
            if diagonal:
                area += times_transposed(rows.flatten(0, 1), weights).view(stop - start, outputs, -1).permute(2, 0, 1)
            else:
                for t in range(len(area)):
                    area[t] += torch.bmm(rows * weights[t], rows.mT)


def _rows(a: Tensor, g: Tensor, basis: Basis, squared: bool) -> Tensor:
    """The rows of inputs ``(batch, positions, in)`` and gradients ``(batch, outputs, positions, out)``, or their squares.

    Returns:
        ``(batch, outputs, out · in)``.
    """
    n, outputs, _, out = g.shape
    turned = g.transpose(2, 3).flatten(1, 2) if g.stride(3) != 1 else g.transpose(1, 2).flatten(2).mT
    if basis.left is None and basis.right is None and _pays_one_by_one(turned, a):
        rows = torch.empty(n, outputs * out, a.shape[2], dtype=g.dtype, device=g.device)
        for row, left, right in zip(rows, turned, a, strict=True):
            found = product(left, right)
            torch.mul(found, found, out=row) if squared else row.copy_(found)
        return rows.view(n, outputs, -1)
    rows = project(batched(turned, a), basis.right).view(n, outputs, out, -1)
    rows = rows if basis.left is None else project(rows.mT, basis.left).mT
    rows = rows.flatten(2)
    return rows.square_() if squared else rows


def _pays_one_by_one(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN, which makes one product at a time, is faster than MKL for all of them."""
    suits = left.dtype == torch.float32 and left.device.type == "cpu" and is_faster()
    return suits and len(left) > 1 and left[0].numel() * right.shape[2] >= _ONE_BY_ONE
