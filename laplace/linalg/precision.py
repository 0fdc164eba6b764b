"""Float64 wherever a tensor lives."""

from __future__ import annotations

from torch import Tensor


def double(values: Tensor) -> Tensor:
    """The tensor in float64: on its own device, or on the host where that has none, as Apple's MPS."""
    return values.cpu().double() if values.device.type == "mps" else values.double()
