r"""Predictive variance of a last layer in closed form.

Its output gradients are unit vectors, so with the bases :math:`Q_B, Q_A` and the variances :math:`w` in them,

.. math:: (J \Sigma J^\top)_{cd} = \sum_o Q_{B,co}\, Q_{B,do} \sum_i w_{oi} (Q_A^\top a)_i^2 ,

and nothing of the size of outputs squared is made for each example unless covariances are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace.capture.contractions import is_bias
from laplace.capture.weights import Weight, mixed_into, under
from laplace.linalg.matmul import product, times_transposed
from laplace.linalg.precision import in_full_precision


@in_full_precision()
def last_layer_variance(
    capture,
    blocks: Sequence,
    bases: Sequence,
    weights: Sequence[Weight],
    n_priors: int,
    diagonal: bool,
    mixed: Sequence[Tensor | None],
) -> Tensor:
    """As :func:`laplace.capture.variance.block_variance`, for outputs ``(batch, outputs)`` of a last layer."""
    n, outputs = capture.f.shape
    shape = (n_priors, n, outputs) + (() if diagonal else (outputs,))
    total = torch.zeros(shape, dtype=capture.dtype, device=capture.f.device)
    for block, basis, weight, mix in zip(blocks, bases, weights, mixed, strict=True):
        left = None if basis.left is None else basis.left.to(capture.dtype)
        squares = None
        if not is_bias(block):
            a = capture.inputs(block.layer)[:, 0]
            squares = (a if basis.right is None else product(a, basis.right.to(a.dtype))).square()
        with mixed_into(total, mix) as part:
            for t, variances in enumerate(part):
                w = under(weight, t).to(capture.dtype)
                # Σ_i w_oi (Qᵀa)_i², (batch, outputs)
                inner = w.flatten().expand(n, -1) if squares is None else times_transposed(squares, w)
                _add(variances, left, inner, diagonal)
    return total


def _add(total: Tensor, left: Tensor | None, inner: Tensor, diagonal: bool) -> None:
    """Add ``Q diag(inner) Qᵀ`` of every example, or its diagonal."""
    if diagonal:
        total += inner if left is None else times_transposed(inner, left.square())
    elif left is None:
        total.diagonal(dim1=1, dim2=2).add_(inner)
    else:
        total += (left * inner[:, None]) @ left.T
