r"""Padded tokens: positions that a mapping's ``attention_mask`` leaves out, and that nothing in the outputs depends on.

Their output gradients are zero, so no Jacobian knows of them; but the inputs of a layer at these positions are not zero, and
would enter the mean :math:`\tfrac1R \sum_r a_r a_r^\top` over positions in a Kronecker factor, which then depended on how far a
batch happens to be padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def kept_tokens(x: Any) -> Tensor | None:
    """Which positions of each example are tokens, ``(batch, time)`` of ones and zeros; None where all are."""
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point() or bool((mask != 0).all()):
        return None
    return mask != 0


def position_weights(kept: Tensor | None, positions: int, g: Tensor | None) -> Tensor | None:
    r"""Weight of every position of a layer in its mean over positions; None where it is :math:`1/R` for all.

    Args:
        kept: Of :func:`kept_tokens`.
        positions: Number of the layer's positions: those of all calls, one after the other.
        g: Output gradients of the layer along one direction, ``(batch, positions, out)``. If they are not zero at the padded
            tokens, the layer's positions are not these tokens, or the model makes use of them.

    Returns:
        ``(batch, positions)``, the rows of which sum to one.
    """
    if kept is None or g is None or positions % kept.shape[1] or positions == 0:
        return None
    whole = kept.to(g.device).repeat(1, positions // kept.shape[1])
    if len(whole) != len(g) or bool(torch.where(whole[..., None], 0, g).any()):
        return None
    return whole.to(g.dtype) / whole.sum(1, keepdim=True).clamp(min=1)
