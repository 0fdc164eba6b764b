r"""Contractions of a capture: curvature sums of the three structures, dense Jacobians, predictive variances.

With inputs :math:`a_{nr}` and output gradients :math:`g_{nr}` of direction :math:`v_k`, the row of the Jacobian of example
:math:`n` is :math:`\sum_r g_{nr} a_{nr}^\top`. Kron sums :math:`\tfrac1R \sum_r a a^\top` and :math:`\sum_r g g^\top`
(KFAC-expand: Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures",
NeurIPS 2023); diag sums the squared row; full sums its outer product. Layers that see one position per example need no
row: their squared row is :math:`g^2 (a^2)^\top`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from laplace.curvature.capture import ranges
from laplace.curvature.gram import add_gram_, add_gram_of_positions_, add_product_
from laplace.curvature.layers import is_outer, is_transposed, weight_rows
from laplace.curvature.sums import Block, CurvatureSums, Factor
from laplace.utils import memory

_CHUNK = 1 << 22  # elements of a temporary of per-example rows
_PATCHES = 1 << 20  # elements of a chunk of layer inputs: small enough to stay in a cache
_ROWS = 4096  # rows of several directions that are added together: large sums are read and written less often


def add_curvature_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    """Add one batch's curvature along the given output directions to the sums, in place.

    Rows and their products are of the capture's type, the running sums of float64: small contributions do not vanish in
    large sums.
    """
    {"kron": _add_kron, "diag": _add_diag, "full": _add_full}[sums.spec.structure](sums, capture, directions)


def is_bias(block: Block) -> bool:
    """Whether this is the bias of a covered layer."""
    return block.layer is not None and block.parameter.rpartition(".")[2] == "bias"


def is_outer_weight(block: Block, capture) -> bool:
    """Whether the parameter's rows are sums of outer products of output gradients and inputs."""
    return block.layer is not None and not is_bias(block) and is_outer(capture.modules[block.layer])


def _add_kron(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    factored = [block for block in sums.spec.blocks if block.has_factors]
    inputs = {name: block.layer for block in factored for name in block.factors if name.endswith("/A")}
    outputs = {name: block.layer for block in factored for name in block.factors if name.endswith("/B")}
    for name, layer in inputs.items():
        for a in capture.input_chunks(layer, _PATCHES):
            add_gram_of_positions_(sums.running(name), [a], 1.0 / a.shape[1])
    waiting: dict[str, list[Tensor]] = {name: [] for name in outputs}
    for v in directions:
        gradients = capture.gradients(v)
        for name, layer in outputs.items():
            waiting[name].append(gradients[layer])
            if sum(g.shape[0] * g.shape[1] for g in waiting[name]) >= _ROWS:
                add_gram_of_positions_(sums.running(name), waiting[name])
                waiting[name] = []
        for block in sums.spec.blocks:
            if not block.has_factors:
                _add_square_of_row(sums, block, gradients, capture, v)
    for name, rest in waiting.items():
        add_gram_of_positions_(sums.running(name), rest)


def _add_diag(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    if any(block.chosen is not None for block in sums.spec.blocks):
        _add_chosen_diag(sums, capture, directions)
        return
    squared: dict[str, Tensor] = {}
    for v in directions:
        gradients = capture.gradients(v)
        for name, g in gradients.items():
            if g.shape[1] == 1 and is_outer(capture.modules[name]):
                square = g[:, 0].square()
                squared[name] = squared[name].add_(square) if name in squared else square.double()
        for block in sums.spec.blocks:
            if block.layer in squared:
                continue
            if is_outer_weight(block, capture):
                left, right = _sides(capture, block.layer, gradients[block.layer])
                _add_squared_rows(sums.running(block.factors[0]), left, right)
            else:
                _add_square_of_row(sums, block, gradients, capture, v)
    for block in sums.spec.blocks:
        if block.layer in squared and is_bias(block):
            sums.running(block.factors[0]).add_(squared[block.layer].sum(0))
        elif block.layer in squared:
            inputs = capture.inputs(block.layer)[:, 0].square()
            square = squared[block.layer].to(inputs.dtype), inputs
            left, right = reversed(square) if is_transposed(capture.modules[block.layer]) else square
            add_product_(sums.running(block.factors[0]).view(left.shape[1], -1), left, right)


def _add_chosen_diag(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    """Diagonals of whole tensors cost no more than the tensors; add the chosen entries of these."""
    blocks = tuple(replace(block, chosen=None) for block in sums.spec.blocks)
    factors = {block.factors[0]: Factor(block.shape) for block in blocks}
    whole = CurvatureSums.zero(replace(sums.spec, blocks=blocks, factors=factors), capture.f.device)
    _add_diag(whole, capture, directions)
    for block in sums.spec.blocks:
        value = whole.tensors[block.factors[0]]
        kept = value if block.chosen is None else value.flatten()[block.indices.to(value.device)]
        sums.running(block.factors[0]).add_(kept)


def _sides(capture, layer: str, g: Tensor) -> tuple[Tensor, Tensor]:
    """Output gradients and inputs of an outer layer, that of the weight's first dimension first."""
    a = capture.inputs(layer)
    return (a, g) if is_transposed(capture.modules[layer]) else (g, a)


def _add_squared_rows(total: Tensor, left: Tensor, right: Tensor) -> None:
    total = total.view(left.shape[-1], -1)
    for start, stop in chunks(left.shape[0], left.shape[-1] * right.shape[-1]):
        total += torch.bmm(left[start:stop].transpose(1, 2), right[start:stop]).square_().sum(0)


def _add_square_of_row(sums: CurvatureSums, block: Block, gradients: dict[str, Tensor], capture, v: Tensor) -> None:
    total = sums.running(block.factors[0])
    for start, stop in chunks(v.shape[0], block.size):
        row = row_of_block(block, gradients, capture, v, start, stop)
        total += row.square().sum(0).view(block.shape)


def row_of_block(
    block: Block, gradients: dict[str, Tensor], capture, v: Tensor, start: int = 0, stop: int | None = None
) -> Tensor:
    """Per-example gradients of one parameter along a direction, ``(batch, kept entries)``; of a range of examples."""
    part = slice(start, stop)
    if block.layer is not None:
        a = None if is_bias(block) else capture.inputs(block.layer)[part]
        return row_of_layer(block, capture.modules[block.layer], a, gradients[block.layer][part])
    jacobian = capture.jacobians[block.parameter][part]
    row = torch.bmm(v[part].to(jacobian.dtype).reshape(len(jacobian), 1, -1), jacobian)[:, 0]
    return row if block.chosen is None else row[:, block.indices.to(row.device)]


def _add_full(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    total = sums.running("full")
    waiting: list[Tensor] = []
    for v in directions:
        waiting.append(jacobian_rows(capture, sums.spec.blocks, v))
        if sum(len(rows) for rows in waiting) >= _ROWS:
            add_gram_(total, waiting)
            waiting = []
    add_gram_(total, waiting)


def jacobian_rows(capture, blocks: tuple[Block, ...], v: Tensor) -> Tensor:
    r"""Per-example gradients :math:`J_n^\top v_n` in the order of the parameter vector, ``(batch, parameters)``."""
    gradients = capture.gradients(v)
    parts = []
    for block in blocks:
        parts.append(row_of_block(block, gradients, capture, v))
    return torch.cat(parts, 1)


def row_of_layer(block: Block, module: torch.nn.Module, a: Tensor | None, g: Tensor) -> Tensor:
    """Per-example gradients of a covered layer's parameter, ``(batch, kept entries)``.

    Of ``Σᵣ gᵣ aᵣᵀ``, few entries are computed one by one, without the whole row.

    Args:
        block: The parameter.
        module: The layer.
        a: Its inputs ``(batch, positions, in)``; not needed for a bias.
        g: Output gradients ``(batch, positions, out)``.
    """
    chosen = None if block.chosen is None else block.indices.to(g.device)
    if is_bias(block):
        row = g.sum(1)
    elif not is_outer(module):
        row = weight_rows(module, a, g)
    else:
        left, right = (a, g) if is_transposed(module) else (g, a)
        width = right.shape[2]
        if chosen is not None and len(chosen) * g.shape[1] < left.shape[2] * width:
            return (left[:, :, chosen // width] * right[:, :, chosen % width]).sum(1)
        row = torch.bmm(left.transpose(1, 2), right).flatten(1)
    return row if chosen is None else row[:, chosen]


def output_directions(f: Tensor) -> Iterator[Tensor]:
    """One unit direction per output (over all positions), each shaped like ``f``."""
    width = f[0].numel()
    for c in range(width):
        v = torch.zeros(f.shape[0], width, dtype=f.dtype, device=f.device)
        v[:, c] = 1
        yield v.reshape(f.shape)


def jacobian_chunks(capture, blocks: tuple[Block, ...]) -> Iterator[Tensor]:
    """Dense Jacobians ``(examples, outputs, parameters)`` of a few examples at a time, in order."""
    directions = list(output_directions(capture.f))
    gradients = [capture.gradients(v) for v in directions]
    for start, stop in chunks(len(capture.f), len(directions) * sum(block.size for block in blocks)):
        rows = [
            torch.cat([row_of_block(block, g, capture, v, start, stop) for block in blocks], 1)
            for g, v in zip(gradients, directions, strict=True)
        ]
        yield torch.stack(rows, 1)


def require_jacobians(
    n: int, outputs: int, parameters: int, dtype: torch.dtype, device: torch.device, of: str = ""
) -> None:
    """Stop before dense Jacobians, and the rows that they are stacked from, exceed the free memory."""
    memory.require(
        2 * memory.tensor_bytes(n, outputs, parameters, dtype=dtype),
        device,
        f"Dense Jacobians of {n} examples x {outputs} outputs x {parameters:,} parameters{of}",
        "Pass fewer examples at once; use a posterior that needs no Jacobian, hessian_structure='kron' or 'diag'; or set "
        "requires_grad=False on parameters without a contraction of their own (la.coverage names them).",
    )


def chunks(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose per-example rows of ``width`` elements stay within the chunk size."""
    return ranges(n, width, _CHUNK)
