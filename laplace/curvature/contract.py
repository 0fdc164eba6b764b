r"""Contractions of a capture: curvature sums of the three structures, dense Jacobians, predictive variances.

With inputs :math:`a_{nr}` and output gradients :math:`g_{nr}` of direction :math:`v_k`, the row of the Jacobian of example
:math:`n` is :math:`\sum_r g_{nr} a_{nr}^\top`. Kron sums :math:`\tfrac1R \sum_r a a^\top` and :math:`\sum_r g g^\top`
(KFAC-expand: Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures",
NeurIPS 2023); diag sums the squared row; full sums its outer product. Layers that see one position per example need no
row: their squared row is :math:`g^2 (a^2)^\top`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace.curvature.capture import ranges
from laplace.curvature.sums import Block, CurvatureSums

_CHUNK = 1 << 22  # elements of a temporary of per-example rows
_PATCHES = 1 << 20  # elements of a chunk of layer inputs: small enough to stay in a cache
_NARROW = 64  # width up to which per-example Gram matrices are cheaper than a transposed copy
_TRIANGLE = 128  # symmetric sums at least twice this wide are computed as block triangles


def add_gram_(total: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """Add ``scale · rowsᵀ rows`` to a symmetric sum; wide sums only above the block diagonal.

    :func:`mirror_` completes wide sums, once after many calls.
    """
    width = total.shape[0]
    if width < 2 * _TRIANGLE:
        total.addmm_(rows.T, rows, alpha=scale)
        return
    for start in range(0, width, _TRIANGLE):
        stop = min(start + _TRIANGLE, width)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:], alpha=scale)


def _add_gram_of_positions(total: Tensor, values: Tensor, scale: float = 1.0) -> None:
    """Add the Gram matrix of ``(batch, positions, width)``; channels-first memory of convolutions is not transposed."""
    width = values.shape[2]
    if values.stride(2) == 1:
        add_gram_(total, values.reshape(-1, width), scale)
    elif width <= _NARROW:
        total.add_(torch.bmm(values.transpose(1, 2), values).sum(0), alpha=scale)
    else:
        add_gram_(total, values.permute(2, 0, 1).reshape(width, -1).T, scale)


def mirror_(total: Tensor) -> None:
    """Copy the upper triangle of a wide symmetric sum to the lower one."""
    if total.shape[0] >= 2 * _TRIANGLE:
        for start in range(0, total.shape[0], _TRIANGLE):
            stop = min(start + _TRIANGLE, total.shape[0])
            total[stop:, start:stop] = total[start:stop, stop:].T


def add_curvature_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    """Add one batch's curvature along the given output directions to the sums, in place."""
    {"kron": _add_kron, "diag": _add_diag, "full": _add_full}[sums.spec.structure](sums, capture, directions)


def _layer_blocks(blocks: tuple[Block, ...]) -> dict[str, dict[int, Block]]:
    """Blocks of covered layers by layer and number of dimensions (1 for the bias)."""
    layers: dict[str, dict[int, Block]] = {}
    for block in blocks:
        if block.layer is not None:
            layers.setdefault(block.layer, {})[1 if len(block.shape) == 1 else 2] = block
    return layers


def _add_kron(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    layers = _layer_blocks(sums.spec.blocks)
    for name, blocks in layers.items():
        if 2 in blocks:
            for a in capture.input_chunks(name, _PATCHES):
                _add_gram_of_positions(sums.tensors[blocks[2].factors[1]], a, 1.0 / a.shape[1])
    for v in directions:
        for name, g in capture.gradients(v).items():
            block = next(iter(layers[name].values()))
            _add_gram_of_positions(sums.tensors[block.factors[0]], g)
        _add_diagonal_of_others(sums, capture, v)
    for name, factor in sums.spec.factors.items():
        if factor.symmetric:
            mirror_(sums.tensors[name])


def _add_diag(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    layers = _layer_blocks(sums.spec.blocks)
    squared: dict[str, Tensor] = {}
    for v in directions:
        for name, g in capture.gradients(v).items():
            blocks = layers[name]
            if g.shape[1] == 1:
                square = g[:, 0].square()
                squared[name] = squared[name] + square if name in squared else square
                continue
            if 1 in blocks:
                sums.tensors[blocks[1].factors[0]] += g.sum(1).square().sum(0)
            if 2 in blocks:
                _add_squared_rows(sums.tensors[blocks[2].factors[0]], g, capture.inputs(name))
        _add_diagonal_of_others(sums, capture, v)
    for name, square in squared.items():
        if 1 in layers[name]:
            sums.tensors[layers[name][1].factors[0]] += square.sum(0)
        if 2 in layers[name]:
            total = sums.tensors[layers[name][2].factors[0]]
            total.view(square.shape[-1], -1).addmm_(square.T, capture.inputs(name)[:, 0].square())


def _add_squared_rows(total: Tensor, g: Tensor, a: Tensor) -> None:
    total = total.view(g.shape[-1], -1)
    for start, stop in chunks(g.shape[0], g.shape[-1] * a.shape[-1]):
        total += torch.bmm(g[start:stop].transpose(1, 2), a[start:stop]).square_().sum(0)


def _add_diagonal_of_others(sums: CurvatureSums, capture, v: Tensor) -> None:
    for block in sums.spec.blocks:
        if block.layer is None:
            row = _row_of_other(capture, block.parameter, v)
            sums.tensors[block.factors[0]] += row.square().sum(0).view(block.shape)


def _row_of_other(capture, parameter: str, v: Tensor) -> Tensor:
    jacobian = capture.jacobians[parameter]
    return torch.bmm(v.to(jacobian.dtype).reshape(v.shape[0], 1, -1), jacobian)[:, 0]


def _add_full(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    total = sums.tensors["full"]
    for v in directions:
        add_gram_(total, jacobian_rows(capture, sums.spec.blocks, v))
    mirror_(total)


def jacobian_rows(capture, blocks: tuple[Block, ...], v: Tensor) -> Tensor:
    r"""Per-example gradients :math:`J_n^\top v_n` in the order of the parameter vector, ``(batch, parameters)``."""
    gradients = capture.gradients(v)
    parts = []
    for block in blocks:
        if block.layer is None:
            parts.append(_row_of_other(capture, block.parameter, v))
        elif len(block.shape) == 1:
            parts.append(gradients[block.layer].sum(1))
        else:
            parts.append(torch.bmm(gradients[block.layer].transpose(1, 2), capture.inputs(block.layer)).flatten(1))
    return torch.cat(parts, 1)


def output_directions(f: Tensor) -> Iterator[Tensor]:
    """One unit direction per output (over all positions), each shaped like ``f``."""
    width = f[0].numel()
    for c in range(width):
        v = torch.zeros(f.shape[0], width, dtype=f.dtype, device=f.device)
        v[:, c] = 1
        yield v.reshape(f.shape)


def jacobians(capture, blocks: tuple[Block, ...]) -> Tensor:
    """Dense Jacobians ``(batch, outputs, parameters)``; for public functions that return them, and small subsets."""
    return torch.stack([jacobian_rows(capture, blocks, v) for v in output_directions(capture.f)], 1)


def chunks(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose per-example rows of ``width`` elements stay within the chunk size."""
    return ranges(n, width, _CHUNK)
