r"""Diagonal curvature: the sum of the squared rows.

Layers that see one position per example need no row: their squared row is :math:`g^2 (a^2)^\top`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from laplace.capture.blocks import Block
from laplace.capture.contractions import chunks, is_bias, is_outer_weight, row_of_block
from laplace.capture.rules import is_outer, is_transposed, touched_words
from laplace.linalg.gram import add_product_
from laplace.linalg.matmul import sum_of_squared_products
from laplace.linalg.precision import in_full_precision
from laplace.structures.specification import Factor
from laplace.structures.sums import CurvatureSums


def blocks_of(shapes, found):
    """Block of every parameter, and a sum for each."""
    blocks = [Block(n, s, found[n][0], (f"{n}/diag",), found[n][1]) for n, s in shapes.items()]
    return blocks, {f"{n}/diag": Factor(s) for n, s in shapes.items()}


def add_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    """Add the squares of the rows of one batch."""
    if any(block.chosen is not None for block in sums.spec.blocks):
        _add_chosen_diag(sums, capture, directions)
        return
    squared: dict[str, Tensor] = {}
    layers = {block.layer for block in sums.held_blocks}
    for v in directions:
        gradients = capture.gradients(v)
        for name, module in capture.modules.items():
            if name not in layers:
                continue
            g = gradients[name]
            if g.shape[1] == 1 and is_outer(module):
                square = g[:, 0].square()
                squared[name] = squared[name].add_(square) if name in squared else square.double()
        for block in sums.held_blocks:
            if block.layer in squared:
                continue
            if is_outer_weight(block, capture):
                _add_squared_rows(sums.running(block.factors[0]), capture, block.layer, gradients[block.layer])
            else:
                add_square_of_row_(sums, block, gradients, capture, v)
    for block in sums.held_blocks:
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
    add_(whole, capture, directions)
    for block in sums.held_blocks:
        value = whole.tensors[block.factors[0]]
        kept = value if block.chosen is None else value.flatten()[block.indices.to(value.device)]
        sums.running(block.factors[0]).add_(kept)


@in_full_precision()
def _add_squared_rows(total: Tensor, capture, layer: str, g: Tensor) -> None:
    """Add the squares of ``Σᵣ gᵣ aᵣᵀ`` of a few examples at a time, whose inputs are made as they are needed."""
    turned = is_transposed(capture.modules[layer])
    first = capture.inputs(layer, 0, 1)
    total = total.view(first.shape[-1] if turned else g.shape[-1], -1)
    for start, stop in chunks(len(g), max(total.numel(), first.numel()), g.device):
        a, part = capture.inputs(layer, start, stop), g[start:stop]
        left, right = (a, part) if turned else (part, a)
        total += sum_of_squared_products(left, right)


def add_square_of_row_(sums: CurvatureSums, block: Block, gradients: dict[str, Tensor], capture, v: Tensor) -> None:
    """Add the squares of one parameter's rows along a direction, from the rows themselves."""
    total = sums.running(block.factors[0])
    table = capture.modules.get(block.layer)
    if isinstance(table, nn.Embedding) and block.chosen is None:
        _, words, rows = touched_words(table, capture.inputs(block.layer), gradients[block.layer])
        total.index_add_(0, words, rows.square().double())
        return
    for start, stop in chunks(v.shape[0], block.size, v.device):
        row = row_of_block(block, gradients, capture, v, start, stop)
        total += row.square().sum(0).view(block.shape)


def diag_vector(sums: CurvatureSums) -> Tensor:
    """The diagonal as one vector in the order of the parameters, rounded to the posterior's type."""
    tensors, dtype = sums.tensors, sums.spec.torch_dtype
    return torch.cat([tensors[block.factors[0]].flatten().to(dtype) for block in sums.spec.blocks])
