r"""Per kind of operation, the rows of one of its inputs, of which all examples have the same: a weight.

A *layout* brings what an operation gives to ``(batch, positions, …)``: the examples are its first dimension, alone or together
with positions, or its second. A rule takes the gradient of what the operation gives and returns rows ``(batch, *shape)`` of the
input. An input that is added or multiplied is the same for all examples where it is broadcast over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace.capture.geometry import Geometry
from laplace.linalg.memory import at_once

_PATCHES = 1 << 20  # elements of a chunk of patches: small enough to stay in a cache

Layout = Callable[[Tensor, int], "Tensor | None"]

VIEWS = frozenset(  # of a parameter, or parts of it, in another order or type
    f"{name}Backward0"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Slice", "Select", "Split",
        "SplitWithSizes", "UnsafeSplit", "Unbind", "Chunk", "ToCopy", "Clone", "Index", "Alias", "Flatten",
    )
) | {"SqueezeBackward1", "TransposeBackward1"}  # fmt: skip


def _first(values: Tensor, n: int) -> Tensor | None:
    """Examples first, each with the same number of parts."""
    return values.unflatten(0, (n, -1)) if values.ndim and len(values) and len(values) % n == 0 else None


def _last(values: Tensor, n: int) -> Tensor | None:
    """Positions first and then examples, in one dimension."""
    parts = _first(values, n)
    return None if parts is None else values.unflatten(0, (-1, n)).transpose(0, 1)


def _second(values: Tensor, n: int) -> Tensor | None:
    """Examples, each with the same number of parts, in the second dimension."""
    if values.ndim < 2 or values.shape[1] == 0 or values.shape[1] % n:
        return None
    return values.unflatten(1, (n, -1)).transpose(0, 1).flatten(1, 2)


LAYOUTS: tuple[Layout, ...] = (_first, _last, _second)


def _laid_out(values: Tensor, layout: Layout, n: int) -> Tensor:
    found = layout(values, n)
    if found is None:
        raise ValueError(f"Values of shape {tuple(values.shape)} are no batch of {n} examples.")
    return found


def _summed_to(values: Tensor, shape: torch.Size) -> Tensor:
    """Values ``(batch, positions, …)`` summed to ``(batch, *shape)``, of what was broadcast from that shape."""
    inner = values.shape[2:]
    extra = len(shape) - len(inner)
    if extra > 0 and shape[:extra].numel() != 1:
        raise ValueError(f"An input of shape {tuple(shape)} differs between examples.")
    aligned = (1,) * -extra + tuple(shape) if extra <= 0 else tuple(shape[extra:])
    axes = [2 + i for i, (size, ours) in enumerate(zip(inner, aligned, strict=True)) if ours == 1 and size != 1]
    return values.sum([1, *axes]).reshape(-1, *shape)


def _added(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    return _summed_to(_laid_out(g, layout, n), use.shape)


def _scaled(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    return _added(use, g * use.node._saved_alpha, layout, n)


def _subtracted(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    return -_scaled(use, g, layout, n)


def _multiplied(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    other = use.node._saved_self if use.slot else use.node._saved_other
    return _added(use, g * _kept(other, g), layout, n)


def _repeated(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    """Where every example is given a copy, one after the other."""
    repeats = tuple(use.node._saved_repeats)
    if repeats != (n, *[1] * (len(use.shape) - 1)):
        raise ValueError(
            f"An input of shape {tuple(use.shape)} is repeated {repeats} times, not once for each example."
        )
    return g.reshape(n, *use.shape)


def _product(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    """The second factor of a product of matrices."""
    addmm = type(use.node).__name__ == "AddmmBackward0"
    rows = _kept(use.node._saved_mat1 if addmm else use.node._saved_self, g)
    scale = use.node._saved_alpha if addmm else 1
    return scale * torch.bmm(_laid_out(rows, layout, n).mT, _laid_out(g, layout, n))


def _product_bias(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    return _added(use, g * use.node._saved_beta, layout, n)


def _kernel(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    """The weight of a convolution, in groups or not: products of output gradients and patches of the input, a few at a time."""
    node, x = use.node, _kept(use.node._saved_input, g)
    if node._saved_transposed:
        return _transposed_kernel(use, g, layout, n)
    geometry, groups = Geometry.of_node(node, tuple(use.shape[2:])), node._saved_groups
    size = geometry.patches(x[:1]).numel()
    rows = []
    for part, gradient in zip(*(v.split(max(1, at_once(_PATCHES, g.device) // size)) for v in (x, g)), strict=True):
        a = geometry.patches(part).unflatten(2, (groups, -1))
        rows.append(torch.einsum("ngor,nrgi->ngoi", gradient.flatten(2).unflatten(1, (groups, -1)), a))
    return _laid_out(torch.cat(rows).reshape(-1, *use.shape), layout, n).sum(1)


def _transposed_kernel(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    """The weight of a transposed convolution, by the backward function of every example alone."""
    node, x = use.node, _kept(use.node._saved_input, g)
    weight = g.new_zeros(use.shape)

    def one(g: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            g[None], x[None], weight, None, node._saved_stride, node._saved_padding, node._saved_dilation,
            node._saved_transposed, node._saved_output_padding, node._saved_groups, [False, True, False],
        )[1]  # fmt: skip

    rows = torch.func.vmap(one)(g, x)
    return _laid_out(rows, layout, n).sum(1)


def _kernel_bias(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    return _laid_out(g.flatten(2).sum(2), layout, n).sum(1)


def _table(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    """A table of which rows are looked up."""
    node = use.node
    if node._saved_scale_grad_by_freq:
        raise ValueError("Gradients that are scaled by frequency are those of no function.")
    index = _laid_out(node._saved_indices.reshape(g.shape[:-1]), layout, n).flatten(1)[..., None]
    g = _laid_out(g, layout, n).reshape(n, -1, g.shape[-1])
    g = g * (index != node._saved_padding_idx)
    return g.new_zeros(n, *use.shape).scatter_add_(1, index.expand_as(g), g)


def _layer_norm(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    node = use.node
    return _added(
        use,
        g * ((_kept(node._saved_input, g) - _kept(node._saved_result1, g)) * _kept(node._saved_result2, g)),
        layout,
        n,
    )


def _batch_norm(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    """The weight of a normalisation by running statistics."""
    node = use.node
    if node._saved_training:
        raise ValueError("A normalisation by the batch's own statistics has no rows of single examples.")
    x, mean, var = (_kept(v, g) for v in (node._saved_input, node._saved_running_mean, node._saved_running_var))
    shape = (-1,) + (1,) * (x.ndim - 2)
    return _by_channel(use, g * (x - mean.view(shape)) * (var + node._saved_eps).rsqrt().view(shape), layout, n)


def _group_norm(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    node = use.node
    shape = (len(g), node._saved_group, -1)
    x = _kept(node._saved_input, g).reshape(shape)
    mean, scale = (_kept(v, g).view(*shape[:2], 1) for v in (node._saved_result1, node._saved_result2))
    return _by_channel(use, g * ((x - mean) * scale).view(g.shape), layout, n)


def _by_channel(use: Any, values: Tensor, layout: Layout, n: int) -> Tensor:
    """Values ``(batch, channels, …)`` summed to rows of the channels."""
    return _laid_out(values.reshape(*values.shape[:2], -1).sum(2), layout, n).sum(1)


def _prelu(use: Any, g: Tensor, layout: Layout, n: int) -> Tensor:
    return _added(use, g * _kept(use.node._saved_self, g).clamp(max=0), layout, n)


def _kept(value: Tensor | None, g: Tensor) -> Tensor:
    """What an operation keeps, in the type of the gradient."""
    if value is None:
        raise ValueError("The operation has not kept what its weight's gradient needs.")
    return value.detach().to(g.dtype)


RULES: dict[tuple[str, int], Callable[[Any, Tensor, Layout, int], Tensor]] = {
    ("AddBackward0", 0): _added,
    ("AddBackward0", 1): _scaled,
    ("SubBackward0", 0): _added,
    ("SubBackward0", 1): _subtracted,
    ("MulBackward0", 0): _multiplied,
    ("MulBackward0", 1): _multiplied,
    ("ExpandBackward0", 0): _added,
    ("RepeatBackward0", 0): _repeated,
    ("AddmmBackward0", 0): _product_bias,
    ("AddmmBackward0", 2): _product,
    ("MmBackward0", 1): _product,
    ("ConvolutionBackward0", 1): _kernel,
    ("ConvolutionBackward0", 2): _kernel_bias,
    ("EmbeddingBackward0", 0): _table,
    ("NativeBatchNormBackward0", 1): _batch_norm,
    ("NativeBatchNormBackward0", 2): _by_channel,
    ("NativeGroupNormBackward0", 1): _group_norm,
    ("NativeGroupNormBackward0", 2): _by_channel,
    ("NativeLayerNormBackward0", 1): _layer_norm,
    ("NativeLayerNormBackward0", 2): _added,
    ("PreluKernelBackward0", 1): _prelu,
}
