r"""Layers whose curvature follows from their inputs and output gradients.

Such a layer computes :math:`z_r = W a_r + b` for every position :math:`r` of an example (one for a plain linear layer, the
output pixels of a convolution, the tokens of a sequence). Its Jacobian with respect to :math:`W` is
:math:`\sum_r g_r a_r^\top`. The functions here bring inputs to ``(batch, positions, in)`` and output gradients to
``(batch, positions, out)``, in the order of the row-major flattened weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_covered(module: nn.Module) -> bool:
    """Whether the curvature of this module can be contracted from captured inputs and output gradients."""
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, nn.Conv2d) and module.groups == 1


def inputs_by_position(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs that multiply the flattened weight, ``(batch, positions, in)``."""
    if isinstance(module, nn.Conv2d):
        return _unfold(module, x).transpose(1, 2)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def gradients_by_position(module: nn.Module, g: Tensor) -> Tensor:
    """Output gradients, ``(batch, positions, out)``."""
    if isinstance(module, nn.Conv2d):
        return g.flatten(2).transpose(1, 2)
    return g.reshape(g.shape[0], -1, g.shape[-1])


def _unfold(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches of a convolution, ``(batch, channels · kernel, positions)``."""
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same" or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, _padding_per_side(module), mode=mode)
        padding = (0, 0)
    return F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)


def _padding_per_side(module: nn.Conv2d) -> list[int]:
    """Padding as ``F.pad`` wants it: last dimension first, left before right."""
    sides: list[int] = []
    for axis in (1, 0):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [module.padding[axis]] * 2
    return sides


def weight_shape_2d(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """``(out, in)`` of a weight with its trailing dimensions flattened."""
    out = shape[0]
    rest = 1
    for size in shape[1:]:
        rest *= size
    return out, rest
