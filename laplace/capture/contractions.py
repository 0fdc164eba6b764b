r"""Contractions of a capture that every structure shares: rows of one parameter, of all, and dense Jacobians.

With inputs :math:`a_{nr}` and output gradients :math:`g_{nr}` of direction :math:`v_k`, the row of the Jacobian of example
:math:`n` is :math:`\sum_r g_{nr} a_{nr}^\top`. What a structure adds up of these is in :mod:`laplace.structures`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace.capture.blocks import Block, row_key
from laplace.capture.rules import is_outer, is_transposed, weight_rows
from laplace.linalg import memory
from laplace.linalg.memory import ranges
from laplace.linalg.precision import in_full_precision

_CHUNK = 1 << 22  # elements of a temporary of per-example rows


def is_bias(block: Block) -> bool:
    """Whether this is the bias of a covered layer, or one that is found by itself where it is added."""
    if block.layer == block.parameter:
        return len(block.shape) == 1
    return block.layer is not None and "bias" in block.parameter.rpartition(".")[2]


def is_outer_weight(block: Block, capture) -> bool:
    """Whether the parameter's rows are sums of outer products of output gradients and inputs."""
    return block.layer is not None and not is_bias(block) and is_outer(capture.modules[block.layer])


@in_full_precision()
def row_of_block(
    block: Block, gradients: dict[str, Tensor], capture, v: Tensor, start: int = 0, stop: int | None = None
) -> Tensor:
    """Per-example gradients of one parameter along a direction, ``(batch, kept entries)``; of a range of examples."""
    part = slice(start, stop)
    if block.layer is not None:
        a = None if is_bias(block) else capture.inputs(block.layer, start, stop)
        return row_of_layer(block, capture.modules[block.layer], a, gradients[block.layer][part])
    row = gradients[row_key(block.parameter)][part]
    return row if block.chosen is None else row[:, block.indices.to(row.device)]


def jacobian_rows(capture, blocks: tuple[Block, ...], v: Tensor) -> Tensor:
    r"""Per-example gradients :math:`J_n^\top v_n` in the order of the parameter vector, ``(batch, parameters)``."""
    gradients = capture.gradients(v)
    parts = []
    for block in blocks:
        parts.append(row_of_block(block, gradients, capture, v))
    return torch.cat(parts, 1)


@in_full_precision()
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
    for start, stop in chunks(len(capture.f), len(directions) * sum(block.size for block in blocks), capture.f.device):
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


def chunks(n: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose per-example rows of ``width`` elements stay within the chunk size."""
    return ranges(n, width, memory.at_once(_CHUNK, device))
