"""The precision of the library's own algebra: float64 wherever a tensor lives, and no rounding by ``torch.autocast``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


def double(values: Tensor) -> Tensor:
    """The tensor in float64: on its own device, or on the host where that has none, as Apple's MPS."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def widened(values: Tensor) -> Tensor:
    """The tensor in float32 at least: of outputs with two digits, logarithms and scores would have no more."""
    return values.float() if torch.finfo(values.dtype).bits < 32 else values


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off inside the block, or the function that this decorates: it would round sums to 8 bits."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
