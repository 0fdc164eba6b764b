r"""Exact curvature of a last layer in closed form: no output direction is formed.

With features :math:`a_n` and the output Hessians :math:`\Lambda_n`, the Kronecker factors are :math:`\sum_n \Lambda_n` and
:math:`\sum_n a_n a_n^\top`, the diagonal is :math:`\sum_n \mathrm{diag}(\Lambda_n)\, (a_n^2)^\top`. Along the columns of a root
of :math:`\Lambda_n`, the same sums cost as many times more as there are classes.
"""

from __future__ import annotations

from torch import Tensor

from laplace.capture.contractions import is_bias
from laplace.likelihoods.base import BaseLikelihood
from laplace.linalg.gram import add_gram_of_positions_, add_product_
from laplace.structures.sums import CurvatureSums


def applies(sums: CurvatureSums, f: Tensor) -> bool:
    """Whether outputs ``f`` have one position, the structure a closed form, and the parameters are a plain layer's."""
    plain = all(block.layer is not None for block in sums.spec.blocks)
    return plain and f.ndim == 2 and sums.spec.structure in ("kron", "diag")


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
