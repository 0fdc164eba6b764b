r"""Layers whose curvature follows from their inputs and output gradients.

An *outer* layer computes :math:`z_r = W a_r + b` for every position :math:`r` of an example (one for a plain linear layer,
the output pixels of a convolution, the tokens of a sequence). Its Jacobian with respect to :math:`W` is
:math:`\sum_r g_r a_r^\top`. The functions here bring inputs to ``(batch, positions, in)`` and output gradients to
``(batch, positions, out)``, in the order of the row-major flattened weight; a layer that stores :math:`W^\top` is
*transposed*. Of a transposed convolution, :math:`r` is an input pixel and :math:`z_r` the patch that it adds to the output,
so that :math:`g_r` is a patch of output gradients; its bias is not one of :math:`z_r`, but added to every output pixel.

A *row* layer has no such form, but the gradient of one example follows from the same two: normalisations, embeddings and
grouped convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace.capture.geometry import Geometry, reads_all
from laplace.capture.products import Product

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CHANNELS_FIRST = (*_CONVOLUTIONS, *_TRANSPOSED, *_BATCH_NORMS, nn.GroupNorm)


def is_outer(module: nn.Module | Product) -> bool:
    """Whether the weight's Jacobian is a sum of outer products of output gradients and inputs."""
    return (
        isinstance(module, (nn.Linear, Product)) or is_transposed(module) or (_is_conv(module) and module.groups == 1)
    )


def is_transposed(module: nn.Module | Product) -> bool:
    """Whether the weight is stored as ``(in, out)``, as those of transposed convolutions and of GPT models' ``Conv1D`` are."""
    if isinstance(module, Product):
        return module.transposed
    if isinstance(module, _TRANSPOSED):
        return module.groups == 1 and reads_all(module.stride, module.output_padding)
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def covers(module: nn.Module, key: str) -> bool:
    """Whether the curvature of this parameter of a module can be contracted from captured inputs and output gradients."""
    if isinstance(module, _TRANSPOSED):
        return key == "weight" and is_transposed(module)
    return key in ("weight", "bias") and is_covered(module)


def is_covered(module: nn.Module) -> bool:
    """Whether the curvature of this module can be contracted from captured inputs and output gradients."""
    if is_outer(module) or isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) or _is_conv(module):
        return True
    if _is_transformers_rms_norm(module):
        return True
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    return isinstance(module, _BATCH_NORMS) and module.track_running_stats


def _is_transformers_rms_norm(module: nn.Module) -> bool:
    """Whether this is the RMS norm of a Hugging Face model, of which every family has a class of its own."""
    kind = type(module)
    ours = kind.__module__.startswith("transformers.") and kind.__name__.endswith("RMSNorm")
    return ours and hasattr(module, "variance_epsilon")


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS)


def is_convolution(module: nn.Module) -> bool:
    """Whether this is a convolution, transposed or not."""
    return isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))


def has_output_factor(module: nn.Module, key: str) -> bool:
    """Whether a parameter of a covered module has a Kronecker factor of output gradients; all biases of convolutions have."""
    return is_outer(module) or (_is_conv(module) and key == "bias")


def _geometry(module: nn.Module | Product) -> Geometry | None:
    """Where a convolution's patches lie; None of what is none."""
    if isinstance(module, Product):
        return module.geometry
    return Geometry.of_module(module) if is_convolution(module) else None


def patches_of(module: nn.Module | Product) -> Geometry | None:
    """Where the patches lie that are a layer's inputs by position; None of what has others."""
    return None if _adds_patches(module) or not is_outer(module) else _geometry(module)


def _adds_patches(module: nn.Module | Product) -> bool:
    """Whether this is a transposed convolution."""
    if isinstance(module, Product):
        return module.geometry is not None and module.transposed
    return isinstance(module, _TRANSPOSED)


def inputs_by_position(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs that multiply the flattened weight, ``(batch, positions, in)``; token indices of an embedding."""
    if isinstance(module, nn.Embedding):
        return x.reshape(x.shape[0], -1, 1)
    if (geometry := _geometry(module)) is not None:
        return _by_position(module, x) if _adds_patches(module) else geometry.patches(x)
    if is_outer(module):
        return x.reshape(x.shape[0], -1, x.shape[-1])
    return _by_position(module, _normalised(module, x.to(torch.promote_types(x.dtype, torch.float32))))


def gradients_by_position(module: nn.Module, g: Tensor) -> Tensor:
    """Output gradients, ``(batch, positions, out)``."""
    if _adds_patches(module):
        return _geometry(module).patches(g)
    return _by_position(module, g)


def widths(module: nn.Module) -> tuple[int, int]:
    """What :func:`inputs_by_position` and :func:`gradients_by_position` give per position."""
    shape = module.weight.shape
    if isinstance(module, nn.Embedding):
        return 1, shape[1]
    if is_transposed(module):
        return shape[0], shape[1:].numel()
    if is_outer(module) or _is_conv(module):
        return shape[1:].numel() * getattr(module, "groups", 1), shape[0]
    return shape.numel(), shape.numel()


def _by_position(module: nn.Module, values: Tensor) -> Tensor:
    """Values shaped like the module's output as ``(batch, positions, out)``."""
    if isinstance(module, _CHANNELS_FIRST) or (isinstance(module, Product) and module.channels_first):
        return values.reshape(*values.shape[:2], -1).transpose(1, 2)
    width = 1
    for size in getattr(module, "normalized_shape", values.shape[-1:]):
        width *= size
    return values.reshape(values.shape[0], -1, width)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a normalisation multiplies by its weight."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    if _is_transformers_rms_norm(module):
        single = x.float()  # as these do, whatever the model's type
        return single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    return F.batch_norm(x, module.running_mean.to(x), module.running_var.to(x), eps=module.eps)


def weight_rows(module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Per-example gradients of a row layer's weight.

    Args:
        module: The layer.
        a: Its inputs from :func:`inputs_by_position`.
        g: Output gradients from :func:`gradients_by_position`; of several outputs ``(batch, outputs, positions, out)``, but for
            an embedding.

    Returns:
        ``(batch, weight size)``, of several outputs ``(batch, outputs, weight size)``.
    """
    if isinstance(module, nn.Embedding):
        index = a.long()
        if module.padding_idx is not None:
            g = g * (index != module.padding_idx)
        rows = torch.zeros(g.shape[0], *module.weight.shape, dtype=g.dtype, device=g.device)
        return rows.scatter_add_(1, index.expand_as(g), g).flatten(1)
    if _is_conv(module):
        g = g.unflatten(-1, (module.groups, -1))
        a = a.unflatten(2, (module.groups, -1))
        return torch.einsum("n...rgo,nrgi->n...goi", g, a).flatten(-3)
    return (g * (a if g.ndim == a.ndim else a[:, None])).sum(-2)


def touched_words(module: nn.Embedding, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The words of a table that each example touches, and their gradients; all others are zero.

    Args:
        module: The table.
        a: Its indices ``(batch, positions, 1)``.
        g: Output gradients ``(batch, positions, …, width)``.

    Returns:
        Numbers of the examples and of the words ``(pairs,)``, and gradients ``(pairs, …, width)``.
    """
    words, size = a[..., 0].long(), len(module.weight)
    pairs = (torch.arange(len(words), device=words.device)[:, None] * size + words).flatten()
    g = g.flatten(0, 1)
    if module.padding_idx is not None:
        kept = words.flatten() != module.padding_idx
        pairs, g = pairs[kept], g[kept]
    found, place = pairs.unique(return_inverse=True)
    rows = torch.zeros(len(found), *g.shape[1:], dtype=g.dtype, device=g.device).index_add_(0, place, g)
    return found // size, found % size, rows
