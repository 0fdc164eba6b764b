r"""The neural tangent kernel :math:`J J^\top` between batches, from captures.

For a layer that sees one position per example, the Jacobian row of direction :math:`v` is :math:`g a^\top`, and the inner
product of two rows factorises: :math:`\langle g a^\top, g' a'^\top \rangle = (g^\top g')(a^\top a')`, two small Gram matrices
and no row. Layers with more positions need rows; they are built for a slice of the layer's outputs at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace.capture import contractions
from laplace.capture.blocks import Block
from laplace.capture.rules import is_transposed
from laplace.linalg.memory import ranges

_SLICE = 1 << 24  # elements of the rows of a slice of a layer's outputs


@dataclass(frozen=True)
class Factored:
    r"""Rows :math:`\sum_r g_{nkr} a_{nr}^\top` of one weight.

    Attributes:
        a: Inputs ``(batch, positions, in)``.
        g: Output gradients ``(batch, directions, positions, out)``.
        transposed: Whether the weight is stored as ``(in, out)``.
    """

    a: Tensor
    g: Tensor
    transposed: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """Explicit rows of a slice of the outputs, ``(batch, directions, slice · in)``, in float64."""
        return torch.einsum("nkro,nri->nkoi", self.g[..., start:stop].double(), self.a.double()).flatten(2)


@dataclass(frozen=True)
class Explicit:
    """Rows ``(batch, directions, out, in)`` of one weight, or ``(batch, directions, size)`` of another parameter."""

    values: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """As :meth:`Factored.rows`."""
        return self.values[:, :, start:stop].double().flatten(2)


Rows = dict[str, Factored | Explicit]


def rows_of(capture, blocks: Sequence[Block], directions: Iterable[Tensor]) -> Rows:
    """Rows of a captured batch along output directions, by parameter.

    Args:
        capture: One batch, from :mod:`laplace.capture.capture`.
        blocks: The parameters.
        directions: Tensors shaped like the outputs.
    """
    collected: dict[str, list[Tensor]] = {block.parameter: [] for block in blocks}
    for v in directions:
        gradients = capture.gradients(v)
        for block in blocks:
            factored = contractions.is_outer_weight(block, capture)
            row = gradients[block.layer] if factored else contractions.row_of_block(block, gradients, capture, v)
            collected[block.parameter].append(row)
    rows: Rows = {}
    for block in blocks:
        values = torch.stack(collected.pop(block.parameter), 1)
        if contractions.is_outer_weight(block, capture):
            module = capture.modules[block.layer]
            rows[block.parameter] = Factored(capture.inputs(block.layer), values, is_transposed(module))
        else:
            rows[block.parameter] = Explicit(values)
    return rows


def shape_of(rows: Rows) -> tuple[int, int]:
    """Number of examples, and of directions for each."""
    first = next(iter(rows.values()))
    return (first.g if isinstance(first, Factored) else first.values).shape[:2]


def rows_of_jacobian(js: Tensor, blocks: Sequence[Block], like: Rows) -> Rows:
    """Dense Jacobians ``(batch, outputs, parameters)`` as rows that can meet those of ``like``."""
    rows: Rows = {}
    for block, part in zip(blocks, js.split([block.size for block in blocks], -1), strict=True):
        other = like[block.parameter]
        if isinstance(other, Factored):
            out, width = other.g.shape[-1], other.a.shape[-1]
            part = part.unflatten(-1, (width, out)).mT if other.transposed else part.unflatten(-1, (out, width))
        rows[block.parameter] = Explicit(part)
    return rows


def concatenate(batches: Sequence[Rows]) -> Rows:
    """Rows of several batches as those of one; sequences of different lengths are padded by positions that add nothing."""
    joined: Rows = {}
    for name, first in batches[0].items():
        parts = [rows[name] for rows in batches]
        if isinstance(first, Explicit):
            joined[name] = Explicit(torch.cat([part.values for part in parts]))
            continue
        longest = max(part.a.shape[1] for part in parts)
        joined[name] = Factored(
            torch.cat([F.pad(p.a, (0, 0, 0, longest - p.a.shape[1])) for p in parts]),
            torch.cat([F.pad(p.g, (0, 0, 0, longest - p.g.shape[2])) for p in parts]),
            first.transposed,
        )
    return joined


def gram(one: Rows, two: Rows, paired: bool = False) -> Tensor:
    """Inner products of all rows of two batches, in float64.

    Args:
        one: Rows of a batch of ``n`` examples along ``k`` directions.
        two: Rows of a batch of ``m`` examples along ``l`` directions.
        paired: Only products of the same direction; then ``k = l``.

    Returns:
        ``(n, k, m, l)``, or ``(k, n, m)`` if ``paired``.
    """
    total: Tensor | None = None
    for name, x in one.items():
        part = _gram_of_parameter(x, two[name], paired)
        total = part if total is None else total + part
    assert total is not None
    return total


def _gram_of_parameter(x: Factored | Explicit, y: Factored | Explicit, paired: bool) -> Tensor:
    if isinstance(x, Factored) and isinstance(y, Factored) and x.a.shape[1] == y.a.shape[1] == 1:
        inputs = x.a[:, 0].double() @ y.a[:, 0].double().T
        outputs = _inner(x.g[:, :, 0].double(), y.g[:, :, 0].double(), paired)
        return outputs * (inputs if paired else inputs[:, None, :, None])
    factored = [side for side in (x, y) if isinstance(side, Factored)]
    if not factored:
        return _inner(x.values.double().flatten(2), y.values.double().flatten(2), paired)
    width, out = factored[0].a.shape[-1], factored[0].g.shape[-1]
    rows = sum((side.g if isinstance(side, Factored) else side.values).shape[:2].numel() for side in (x, y))
    total = 0
    for start, stop in ranges(out, width * rows, _SLICE):
        total = total + _inner(x.rows(start, stop), y.rows(start, stop), paired)
    return total


def _inner(x: Tensor, y: Tensor, paired: bool) -> Tensor:
    if paired:
        return x.transpose(0, 1) @ y.permute(1, 2, 0)
    return (x.flatten(0, 1) @ y.flatten(0, 1).T).unflatten(1, y.shape[:2]).unflatten(0, x.shape[:2])
