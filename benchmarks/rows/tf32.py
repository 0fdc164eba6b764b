"""Products of TF32 on a CPU: the operands rounded to 10 bits, added up in float32, as CUDA's chips do.

Where torch's switches ask for TF32, so that what the library takes out of it is taken out here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_KEPT = -(1 << 13)  # of a float32's bits: all but the last 13 of its mantissa
_HALF = 1 << 12
_GROUPS = {
    "aten::convolution": 8,
    "aten::convolution_backward": 9,
}  # of convolutions; those in groups are no products there
_MULTIPLIED = {  # which of an operation's arguments are operands of products
    "aten::convolution": (0, 1),
    "aten::convolution_backward": (0, 1, 2),
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "mkldnn::_linear_pointwise": (0, 1),
}


class EmulatedTf32(TorchDispatchMode):
    """Rounds the operands of products of float32 values inside of the block, where the CPU's switches say TF32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.name().partition(".")[0]
        kind = "conv" if "conv" in name else "matmul"
        grouped = name in _GROUPS and args[_GROUPS[name]] > 1
        if name in _MULTIPLIED and not grouped and getattr(torch.backends.mkldnn, kind).fp32_precision == "tf32":
            args = tuple(_rounded(arg) if number in _MULTIPLIED[name] else arg for number, arg in enumerate(args))
        return func(*args, **(kwargs or {}))


def _rounded(values: Any) -> Any:
    """To the nearest number with a mantissa of 10 bits, as the chip converts what it multiplies."""
    if not isinstance(values, Tensor) or values.dtype != torch.float32:
        return values
    bits = values.detach().contiguous().view(torch.int32)
    return ((bits + _HALF) & _KEPT).view(torch.float32)
