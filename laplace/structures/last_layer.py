r"""Curvature of a last layer in closed form.

With features :math:`a_n` and the output Hessians :math:`\Lambda_n`, the Kronecker factors are :math:`\sum_n \Lambda_n` and
:math:`\sum_n a_n a_n^\top`, the diagonal is :math:`\sum_n \mathrm{diag}(\Lambda_n)\, (a_n^2)^\top`, and the dense curvature is
:math:`\sum_n \Lambda_n \otimes a_n a_n^\top`. Along the columns of a root of :math:`\Lambda_n`, each of them costs about as
many times more as there are classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from laplace.capture.contractions import is_bias
from laplace.data.example_weights import along
from laplace.likelihoods.base import BaseLikelihood
from laplace.linalg.gram import (
    add_gram_of_positions_,
    add_product_,
    complete_blocks_,
    mirror_,
    mirror_weighted_,
    weighted_gram,
)
from laplace.linalg.memory import ranges
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums

_ROOTS = 1 << 22  # elements of the roots of output Hessians that are held at once


def applies(spec: SumsSpec, f: Tensor) -> bool:
    """Whether outputs ``f`` have one position, and the parameters are a plain layer's."""
    return f.ndim == 2 and all(block.layer is not None for block in spec.blocks)


def add_(
    sums: CurvatureSums,
    capture,
    likelihood: BaseLikelihood,
    f: Tensor,
    y: Tensor,
    weights: Tensor | None = None,
) -> None:
    """Add the exact curvature of one batch.

    Args:
        sums: The state to add to, of Kronecker factors or a diagonal over the last layer alone.
        capture: :class:`laplace.capture.last_layer.LastLayerCapture` of the batch.
        likelihood: Of the targets given the outputs.
        f: Outputs ``(batch, outputs)`` in float64.
        y: Targets.
        weights: Of the examples, ``(batch,)``; 1 each if not given.
    """
    a = capture.inputs(sums.spec.blocks[0].layer)
    a = a if weights is None else along(weights.sqrt(), a) * a
    if sums.spec.structure == "kron":
        for name in dict.fromkeys(name for block in sums.spec.blocks for name in block.factors):
            if not sums.holds(name):
                continue
            if name.endswith("/A"):
                add_gram_of_positions_(sums.running(name), [a])
            else:
                sums.add_whole_(name, _hessian_sum(likelihood, f, y, weights))
        return
    diagonal, squares = likelihood.hessian_diagonal(f, y), a[:, 0].square()
    for block in sums.held_blocks:
        total = sums.running(block.factors[0])
        if is_bias(block):
            total.add_((diagonal if weights is None else along(weights, diagonal) * diagonal).sum(0))
        else:
            add_product_(total, diagonal.to(squares.dtype), squares)


def _hessian_sum(likelihood: BaseLikelihood, f: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    return likelihood.hessian_sum(f, y) if weights is None else likelihood.weighted_hessian_sum(f, y, weights)


def add_full_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    r"""Add the dense curvature of one batch, in float64: for every pair of outputs one weighted Gram matrix of the features.

    Args:
        sums: The state to add to, dense over the last layer alone.
        capture: :class:`laplace.capture.last_layer.LastLayerCapture` of the batch.
        directions: Columns :math:`v_k` of a root of the output Hessian or its estimate, ``(batch, outputs)``.
    """
    layer = sums.spec.blocks[0].layer
    a, roots = capture.inputs(layer)[:, 0].double(), torch.stack(list(directions), 2).double()
    sides = [torch.ones_like(a[:, :1]) if is_bias(block) else a for block in sums.spec.blocks]
    total = sums.running("full", partial(_complete_, roots.shape[1], tuple(side.shape[1] for side in sides)))
    for start, stop in ranges(len(a), roots.shape[1] ** 2, _ROOTS):
        hessians = roots[start:stop] @ roots[start:stop].mT
        _add_pairs_(total, hessians.permute(1, 2, 0).contiguous(), [side[start:stop] for side in sides])


def _add_pairs_(total: Tensor, hessians: Tensor, sides: list[Tensor]) -> None:
    """Add, on and left of the diagonal, the block of every pair of outputs of every pair of parameters.

    A block of two outputs of one parameter is symmetric by itself: of a whole sum, one half is left to :func:`_complete_`.

    Args:
        total: The sum, or some of its rows; those of a parameter are those of its outputs one after the other.
        hessians: ``(outputs, outputs, batch)``.
        sides: What each parameter is multiplied by: the features ``(batch, in)`` of a weight, the ones of a bias.
    """
    for i, j, o, p, row, column in _pairs(len(hessians), [side.shape[1] for side in sides]):
        left, right, weights = sides[i], sides[j], hessians[o, p]
        if not _rows_there(total, row, right.shape[1]):
            continue
        if i == j:
            for r, c, product in weighted_gram(left, weights, both=o != p and not _is_whole(total)):
                _add_at_(total, row + r, column + c, product)
        else:
            _add_at_(total, row, column, (right * weights[:, None]).T @ left)


def _pairs(outputs: int, widths: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Pairs of parameters and of outputs of each, and the first row and column of their block, on or left of the diagonal."""
    first = 0
    for i, left in enumerate(widths):
        second = first
        for j, right in enumerate(widths[i:], i):
            for o in range(outputs):
                for p in range(o if i == j else 0, outputs):
                    yield i, j, o, p, second + p * right, first + o * left
            second += outputs * right
        first += outputs * left


def _complete_(outputs: int, widths: tuple[int, ...], total: Tensor) -> None:
    """Complete what :func:`_add_pairs_` leaves out."""
    for i, j, o, p, row, column in _pairs(outputs, widths) if _is_whole(total) else ():
        if i == j and o != p:
            mirror_weighted_(total[row : row + widths[i], column : column + widths[i]])
    complete_blocks_(total)
    mirror_(total)


def _is_whole(total: Tensor) -> bool:
    return total.shape[0] == total.shape[1]


def _rows_there(total: Tensor, row: int, count: int) -> bool:
    """Whether any of so many rows of the sum is among those that are kept."""
    return row < total.shape[1] and row + count > total.shape[1] - total.shape[0]


def _add_at_(total: Tensor, row: int, column: int, product: Tensor) -> None:
    """Add a product to the sum at a row and column of the whole, as far as these rows are kept."""
    last = total.shape[1]
    first = last - total.shape[0]
    start, stop = max(row, first), min(row + len(product), last)
    if start < stop and column < last:
        product = product[start - row : stop - row, : last - column]
        total[start - first : stop - first, column : column + product.shape[1]].add_(product)
