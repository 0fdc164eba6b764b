r"""Predictive variance :math:`J \Sigma J^\top` of the linearised network, without a Jacobian.

The covariance of one parameter is kept as :math:`\Sigma = (Q_B \otimes Q_A)\,\mathrm{diag}(w)\,(Q_B \otimes Q_A)^\top`
(identity bases for a diagonal posterior). With one position per example,

.. math:: (J \Sigma J^\top)_{cd} = \sum_o (Q_B^\top g_c)_o (Q_B^\top g_d)_o \sum_i w_{oi} (Q_A^\top a)_i^2 ,

two small matrix products. The bases do not depend on a scalar or layerwise prior precision, so a sweep over many of them
projects the batch once and repeats only the product with :math:`w`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laplace.capture.blocks import Basis, Block, row_key
from laplace.capture.contractions import chunks, is_bias
from laplace.capture.every_output import OutputGradients, gradients_of_outputs
from laplace.capture.last_layer import LastLayerCapture
from laplace.capture.last_layer_variance import last_layer_variance
from laplace.capture.outer_variance import add_outer_variance, project
from laplace.capture.rules import is_outer, is_transposed, touched_words, weight_rows
from laplace.capture.weights import ALL, Weight, constant, mixed_into, transposed, under
from laplace.linalg.matmul import product
from laplace.linalg.precision import in_full_precision, without_autocast


@without_autocast()
def block_variance(
    capture,
    blocks: Sequence[Block],
    bases: Sequence[Basis],
    weights: Sequence[Weight],
    n_priors: int,
    diagonal: bool,
    mixed: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Predictive variances for ``n_priors`` covariances that share their bases.

    Args:
        capture: One batch, from :mod:`laplace.capture.capture`.
        blocks: The parameters.
        bases: Bases by block.
        weights: By block, the variances in the basis.
        n_priors: How many priors to evaluate.
        diagonal: Return the variances of the outputs alone instead of their covariance.
        mixed: By block, coefficients ``(priors, others)`` with which those of other priors give what is wanted; the weights
            are of these then. None where there are none.

    Returns:
        ``(priors, batch, outputs)`` if ``diagonal`` else ``(priors, batch, outputs, outputs)``.
    """
    mixed = mixed or [None] * len(blocks)
    plain = all(block.layer is not None for block in blocks)
    if plain and isinstance(capture, LastLayerCapture) and capture.f.ndim == 2:
        return last_layer_variance(capture, blocks, bases, weights, n_priors, diagonal, mixed)
    outputs = capture.f[0].numel()
    shape = (n_priors, capture.f.shape[0], outputs) + (() if diagonal else (outputs,))
    total = torch.zeros(shape, dtype=capture.dtype, device=capture.f.device)
    by_layer: dict[str, list[int]] = {}
    gradients = gradients_of_outputs(capture)
    for index, block in enumerate(blocks):
        if block.layer is None:
            with mixed_into(total, mixed[index]) as part:
                _add_rows(part, gradients.pop(row_key(block.parameter)), weights[index], diagonal)
        else:
            by_layer.setdefault(block.layer, []).append(index)
    for layer, indices in by_layer.items():
        g = gradients.pop(layer)
        for index in indices:
            with mixed_into(total, mixed[index]) as part:
                _add_layer(part, capture, g, blocks[index], bases[index], weights[index], diagonal)
    return total


@in_full_precision()
def _add_layer(total, capture, g: OutputGradients, block: Block, basis: Basis, weight: Weight, diagonal: bool) -> None:
    module = capture.modules[block.layer]
    if is_bias(block):
        _add_rows(total, project(g.sums(), basis.left), weight, diagonal)
        return
    if not is_outer(module):
        _add_row_layer(total, capture, g, block, weight, diagonal)
        return
    if is_transposed(module):
        basis, weight = Basis(basis.right, basis.left), transposed(weight)

    def inputs(start: int, stop: int) -> Tensor:
        return capture.inputs(block.layer, start, stop)

    add_outer_variance(total, inputs, g, basis, weight, inputs(0, 1).shape[1:], diagonal)


def _add_row_layer(total, capture, g: OutputGradients, block: Block, weight: Weight, diagonal: bool) -> None:
    """Add the variance of a layer whose rows are neither outer products nor sums of them; their covariance is diagonal."""
    module = capture.modules[block.layer]
    if isinstance(module, nn.Embedding):
        _add_table(total, module, capture.inputs(block.layer), g.of(), weight, diagonal)
        return
    (n, outputs, positions, out), entries = g.shape, torch.Size(block.shape).numel()
    for start, stop in chunks(n, outputs * max(entries, positions * out), total.device):
        rows = weight_rows(module, capture.inputs(block.layer, start, stop), g.of(start, stop))
        _add_rows(total[:, start:stop], rows, weight, diagonal)


def _add_table(total: Tensor, table: nn.Embedding, a: Tensor, g: Tensor, weight: Weight, diagonal: bool) -> None:
    """Add the variance of an embedding's weight, of the words alone that an example touches."""
    examples, words, rows = touched_words(table, a, g.transpose(1, 2))
    for t in range(total.shape[0]):
        scaled = rows * under(weight, t).to(rows.dtype).reshape(table.weight.shape)[words][:, None]
        part = (scaled * rows).sum(-1) if diagonal else scaled @ rows.mT
        total[t].index_add_(0, examples, part)


def _add_rows(total: Tensor, rows: Tensor, weight: Weight, diagonal: bool) -> None:
    """Add the variance of explicit rows ``(batch, outputs, size)``."""
    if not diagonal:
        for t in range(total.shape[0]):
            total[t] += torch.bmm(rows * under(weight, t).to(rows.dtype).flatten(), rows.transpose(1, 2))
        return
    squared = rows.square()
    for start, stop in chunks(total.shape[0], rows.shape[-1], rows.device):  # several priors share one product
        weights = weight(slice(start, stop), ALL, ALL).to(rows.dtype).flatten(1)
        total[start:stop] += product(squared, weights.T).permute(2, 0, 1)


@in_full_precision()
def dense_variance(rows: Tensor, basis: Tensor, weights: Sequence[Tensor], diagonal: bool) -> Tensor:
    """Predictive variances from dense Jacobians ``(batch, outputs, parameters)`` and one basis over all parameters.

    Args:
        rows: The Jacobians.
        basis: Orthonormal, or a root of the covariance.
        weights: For every prior, the variances in the basis.
        diagonal: Return the variances of the outputs alone instead of their covariance.

    Returns:
        ``(priors, batch, outputs)`` if ``diagonal`` else ``(priors, batch, outputs, outputs)``.
    """
    projected = product(rows, basis.to(rows.dtype))
    shape = (len(weights), rows.shape[0], rows.shape[1]) + (() if diagonal else (rows.shape[1],))
    total = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
    _add_rows(total, projected, constant(*weights), diagonal)
    return total
