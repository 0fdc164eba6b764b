r"""Dense curvature :math:`\sum_n \sum_k r_{nk} r_{nk}^\top` from rows :math:`r_{nk} = J_n^\top v_{nk}`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace.capture.blocks import Block
from laplace.capture.contractions import jacobian_rows
from laplace.linalg.gram import add_gram_
from laplace.structures.specification import Factor
from laplace.structures.sums import CurvatureSums

_ROWS = 4096  # rows of several directions that are added together: large sums are read and written less often


def blocks_of(shapes, found):
    """Block of every parameter, and the one sum."""
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    blocks = [Block(n, s, found[n][0], ("full",), found[n][1]) for n, s in shapes.items()]
    return blocks, {"full": Factor((size, size), symmetric=True)}


def add_(sums: CurvatureSums, capture, directions: Iterator[Tensor]) -> None:
    """Add the outer products of the rows of one batch.

    In float64: next to large curvature, products that were rounded to float32 look like curvature in directions that have none.
    """
    total = sums.running("full")
    waiting: list[Tensor] = []
    for v in directions:
        waiting.append(jacobian_rows(capture, sums.spec.blocks, v))
        if sum(len(rows) for rows in waiting) >= _ROWS:
            add_gram_(total, waiting, exact=True)
            waiting = []
    add_gram_(total, waiting, exact=True)
