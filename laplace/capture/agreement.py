"""Whether terms add up to what was computed otherwise, up to the rounding of both.

Terms that are rounded each by itself are off by what their root sum of squares says. Next to the sum of their absolute values,
which grows with their number where they cancel, something that is not their sum at all may be small.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ACCUMULATED = 1e-6  # what adding up in float32 may leave, relative to the sum of absolute values


def allowed(total: Tensor, root: Tensor, absolute: Tensor, spacing: float) -> Tensor:
    """The norm of a difference that rounding may make.

    Args:
        total: Norm of the sum.
        root: Norm of the root sums of squares of its terms.
        absolute: Norm of the sums of their absolute values.
        spacing: Of the coarsest numbers near 1 among what they were computed from.
    """
    return min(1e3 * spacing, 0.05) * torch.maximum(total, root) + _ACCUMULATED * absolute


def add_up(terms: Tensor, total: Tensor, spacing: float) -> bool:
    """Whether terms ``(n, size)`` add up to ``(size,)``.

    Args:
        terms: The terms.
        total: What they are to add up to.
        spacing: See :func:`allowed`.
    """
    root, absolute = terms.square().sum(0).sqrt(), terms.abs().sum(0)
    return bool((terms.sum(0) - total).norm() <= allowed(total.norm(), root.norm(), absolute.norm(), spacing))
