r"""Curvature of a last layer in closed form.

With features :math:`a_n` and the output Hessians :math:`\Lambda_n`, the Kronecker factors are :math:`\sum_n \Lambda_n` and
:math:`\sum_n a_n a_n^\top`, the diagonal is :math:`\sum_n \mathrm{diag}(\Lambda_n)\, (a_n^2)^\top`, and the dense curvature is
:math:`\sum_n \Lambda_n \otimes a_n a_n^\top`. Along the columns of a root of :math:`\Lambda_n`, each of them costs about as
many times more as there are classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from laplace.capture.capture import ranges
from laplace.capture.contractions import is_bias
from laplace.likelihoods.base import BaseLikelihood
from laplace.linalg.gram import add_gram_of_positions_, add_product_, add_weighted_gram_, mirror_whole_
from laplace.structures.sums import CurvatureSums, SumsSpec

_ROOTS = 1 << 22  # elements of the roots of output Hessians that are held at once


def applies(spec: SumsSpec, f: Tensor) -> bool:
    """Whether outputs ``f`` have one position, and the parameters are a plain layer's."""
    return f.ndim == 2 and all(block.layer is not None for block in spec.blocks)


def add_(sums: CurvatureSums, capture, likelihood: BaseLikelihood, f: Tensor, y: Tensor) -> None:
    """Add the exact curvature of one batch.

    Args:
        sums: The state to add to, of Kronecker factors or a diagonal over the last layer alone.
        capture: :class:`laplace.capture.last_layer.LastLayerCapture` of the batch.
        likelihood: Of the targets given the outputs.
        f: Outputs ``(batch, outputs)`` in float64.
        y: Targets.
    """
    a = capture.inputs(sums.spec.blocks[0].layer)
    if sums.spec.structure == "kron":
        for name in dict.fromkeys(name for block in sums.spec.blocks for name in block.factors):
            if name.endswith("/A"):
                add_gram_of_positions_(sums.running(name), [a])
            else:
                sums.running(name).add_(likelihood.hessian_sum(f, y))
        return
    diagonal, squares = likelihood.hessian_diagonal(f, y), a[:, 0].square()
    for block in sums.spec.blocks:
        total = sums.running(block.factors[0])
        if is_bias(block):
            total.add_(diagonal.sum(0))
        else:
            add_product_(total, diagonal.to(squares.dtype), squares)


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
    """Add, on and above the diagonal, the block of every pair of outputs of every pair of parameters.

    A block of one parameter is symmetric by itself; what is below its own diagonal is left to :func:`_complete_`.

    Args:
        total: The sum; the rows of a parameter are those of its outputs one after the other.
        hessians: ``(outputs, outputs, batch)``.
        sides: What each parameter is multiplied by: the features ``(batch, in)`` of a weight, the ones of a bias.
    """
    widths = tuple(side.shape[1] for side in sides)
    for i, j, o, p, area in _areas(total, len(hessians), widths):
        if i == j:
            add_weighted_gram_(area, sides[i], hessians[o, p])
        else:
            area.addmm_((sides[i] * hessians[o, p, :, None]).T, sides[j])


def _areas(total: Tensor, outputs: int, widths: tuple[int, ...]) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """The blocks on and above the diagonal: numbers of the two parameters and of the two outputs, and the block itself."""
    first = 0
    for i, left in enumerate(widths):
        second = first
        for j, right in enumerate(widths[i:], i):
            area = total[first : first + outputs * left, second : second + outputs * right]
            area = area.unflatten(0, (outputs, left)).unflatten(2, (outputs, right))
            for o in range(outputs):
                for p in range(o if i == j else 0, outputs):
                    yield i, j, o, p, area[o, :, p]
            second += outputs * right
        first += outputs * left


def _complete_(outputs: int, widths: tuple[int, ...], total: Tensor) -> None:
    """Complete what :func:`_add_pairs_` leaves out."""
    for i, j, _, _, area in _areas(total, outputs, widths):
        if i == j:
            mirror_whole_(area)
    mirror_whole_(total)
