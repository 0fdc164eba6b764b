r"""Block-diagonal curvature: for every layer the dense :math:`\sum_n \sum_k r_{nk} r_{nk}^\top` of its own parameters.

A layer is a module with parameters of its own, weight and bias together; a parameter of a model that has modules is one of its
own, while a model without any is a layer, whose sum is called `block`.
The rows :math:`r_{nk} = J_n^\top v_{nk}` are those of the dense structure, without what couples layers. The sum of a layer with
:math:`p` parameters takes :math:`8 p^2` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from laplace.capture.blocks import Block
from laplace.capture.contractions import row_of_block
from laplace.linalg.gram import add_gram_
from laplace.structures.specification import Factor
from laplace.structures.sums import CurvatureSums

MODEL = "block"  # the sum of a model that is one layer itself
_ROWS = 4096  # rows of several directions that are added together: large sums are read and written less often


def blocks_of(shapes, found, bare: bool = False):
    """Block of every parameter, and one sum for all of a layer; ``bare`` is a model that is one layer itself."""
    blocks: list[Block] = []
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        owner = name.rpartition(".")[0] or name
        total = MODEL if bare else f"{owner}/block"
        if total in sizes and blocks[-1].factors != (total,):  # its parameters are not next to one another
            total = f"{name}/block"
        blocks.append(Block(name, shape, found[name][0], (total,), found[name][1]))
        sizes[total] = sizes.get(total, 0) + torch.Size(shape).numel()
    return blocks, {total: Factor((size, size), symmetric=True) for total, size in sizes.items()}


def layers(blocks: Sequence[Block]) -> dict[str, list[int]]:
    """Which parameters make up a layer, as indices in order, by the name of the layer's sum."""
    found: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        found.setdefault(block.factors[0], []).append(index)
    return found


def add_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    """Add the outer products of the layers' rows of one batch, in float64, as :mod:`laplace.structures.full` does."""
    blocks = sums.spec.blocks
    members = {name: indices for name, indices in layers(blocks).items() if sums.holds(name)}
    waiting: dict[str, list[Tensor]] = {name: [] for name in members}
    for v in directions:
        gradients = capture.gradients(v)
        for name, indices in members.items():
            rows = [row_of_block(blocks[i], gradients, capture, v) for i in indices]
            waiting[name].append(torch.cat(rows, 1))
            if sum(len(rows) for rows in waiting[name]) >= _ROWS:
                add_gram_(sums.running(name), waiting[name], exact=True)
                waiting[name] = []
    for name, rest in waiting.items():
        add_gram_(sums.running(name), rest, exact=True)
