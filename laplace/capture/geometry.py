"""Where a convolution's patches lie, of a module or of a node in a graph, and the patches themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_NARROW = 8  # positions along the last axis, up to which torch's own kernel makes patches faster


@dataclass(frozen=True)
class Geometry:
    """A convolution without its weight, over one or more axes.

    Attributes:
        kernel: Size of the kernel along every axis.
        stride: Steps from one patch to the next.
        dilation: Steps inside of a patch.
        padding: What is added before and after every axis.
        mode: How it is added, as ``padding_mode`` of the modules.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "zeros"

    @classmethod
    def of_module(cls, module: nn.Module) -> Geometry:
        """That of a convolution, transposed or not."""
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        if module.padding == "valid":
            padding = [(0, 0)] * len(kernel)
        elif module.padding == "same":
            totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            padding = [(total // 2, total - total // 2) for total in totals]
        else:
            padding = [(size, size) for size in module.padding]
        return cls(kernel, tuple(module.stride), dilation, tuple(padding), module.padding_mode)

    @classmethod
    def of_node(cls, node: Any, kernel: tuple[int, ...]) -> Geometry:
        """That of a convolution in a graph, transposed or not."""
        padding = tuple((size, size) for size in node._saved_padding)
        return cls(kernel, tuple(node._saved_stride), tuple(node._saved_dilation), padding)

    def patches(self, x: Tensor) -> Tensor:
        """Patches of ``(batch, channels, …)``, as ``(batch, positions, channels · kernel)``."""
        axes = range(len(self.kernel))
        if set(self.kernel) == {1} and not any(map(any, self.padding)):
            for axis in axes:
                x = x[(slice(None),) * (2 + axis) + (slice(None, None, self.stride[axis]),)]
            return x.flatten(2).transpose(1, 2)
        if self._is_unfolded_by_torch(x):
            padding = tuple(before for before, _ in self.padding)
            return F.unfold(x, self.kernel, self.dilation, padding, self.stride).transpose(1, 2)
        if any(map(any, self.padding)):
            sides = [side for pair in reversed(self.padding) for side in pair]
            x = F.pad(x, sides, mode="constant" if self.mode == "zeros" else self.mode)
        for axis in axes:
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        first, last = 2, 2 + len(axes)  # batch, channels, positions along each axis, kernel along each axis
        if x.is_cuda:
            return x.movedim(1, last - 1).flatten(last - 1).flatten(1, last - 2)
        x = x.movedim(tuple(range(first, last)), tuple(range(last, last + len(axes))))
        return x.contiguous().flatten(last).flatten(1, last - 1).transpose(1, 2)

    def positions(self, sizes: Sequence[int]) -> int:
        """How many patches an input of these sizes along the axes has."""
        count = 1
        for size, pair, kernel, stride, step in zip(
            sizes, self.padding, self.kernel, self.stride, self.dilation, strict=True
        ):
            count *= (size + sum(pair) - step * (kernel - 1) - 1) // stride + 1
        return count

    def _is_unfolded_by_torch(self, x: Tensor) -> bool:
        """Whether torch's own kernel makes the patches faster than a copy of a view, whose innermost loop is a row of them.

        On GPUs it is a kernel for every example.
        """
        if len(self.kernel) != 2 or x.is_cuda or self.mode != "zeros":
            return False
        even = all(before == after for before, after in self.padding)
        return even and x.shape[-1] < _NARROW * self.stride[-1]


def reads_all(stride: tuple[int, ...], output_padding: tuple[int, ...]) -> bool:
    """Whether the patches of a transposed convolution's output are those that its input's pixels add, and no more."""
    return all(extra < step for extra, step in zip(output_padding, stride, strict=True))
