r"""Weights of examples: an example of weight 2 adds what it would add twice, one of weight 0 nothing.

All that is added up over examples, the loss and the number of examples among it, is then :math:`\sum_n w_n s_n`. Curvature is
quadratic in output directions, and in the inputs of a layer where those are a Kronecker factor, so these are multiplied by
:math:`\sqrt{w_n}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def checked(weights: Sequence[float] | Tensor, n: int, device: torch.device | str, offset: int = 0) -> Tensor:
    """The weights of a batch, ``(n,)`` float64 on a device.

    Args:
        weights: One for each example.
        n: Number of examples.
        device: Where they go.
        offset: Index in the data set of the first one, for messages.

    Raises:
        ValueError: If there is not one for each example, or one is negative, NaN or infinite; names the example.
    """
    found = torch.as_tensor(weights, dtype=torch.float64, device=device)
    if tuple(found.shape) != (n,):
        raise ValueError(
            f"Weights of shape {tuple(found.shape)} for a batch of {n} examples: give one number for each example, ({n},)."
        )
    wrong = ~(torch.isfinite(found) & (found >= 0))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"The weight of example {offset + first} is {found[first].item()}; a weight must be finite and not negative, and 0 "
            "leaves an example out."
        )
    return found


def along(weights: Tensor, values: Tensor) -> Tensor:
    """Weights ``(batch,)`` in a shape that multiplies values ``(batch, …)`` example by example, in their type."""
    return weights.to(values).reshape(-1, *[1] * (values.ndim - 1))


def weighted(directions: Iterator[Tensor], weights: Tensor | None) -> Iterator[Tensor]:
    r"""Output directions times :math:`\sqrt{w_n}`, so that what is quadratic in them is weighted; no weights, no change."""
    return directions if weights is None else (along(weights.sqrt(), v) * v for v in directions)
