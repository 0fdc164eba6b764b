"""Jacobians whose own derivative with respect to the inputs is right where :mod:`torch.func` gets it wrong.

The batching rules of ``torch.func`` for the backward passes of ``layer_norm``, and of batch and instance norm by the batch's
own statistics, take the saved mean and deviation for constants (see pytorch/functorch issue 534): the Jacobian is right, its
derivative is not, and nothing says so. Networks that call these are therefore differentiated by ordinary autograd, one example
and one output at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace.data.batches import length_of, part_of

_NORMS = (  # normalisations by running statistics are linear, and right under torch.func; their outputs 1 and 2 are empty
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten._native_batch_norm_legit.no_stats,
    torch.ops.aten._native_batch_norm_legit.default,
    torch.ops.aten.cudnn_batch_norm.default,
)


class _LayerNormSeen(TorchDispatchMode):
    """Notices normalisation by statistics of the inputs themselves, by modules or by functions."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen = self.seen or (func in _NORMS and out[1].numel() > 0)
        return out


def calls_layer_norm(model: nn.Module, x: Any) -> bool:
    """Whether a forward pass normalises by statistics of its inputs, as ``layer_norm`` does."""
    with torch.no_grad(), _LayerNormSeen() as mode:
        model(part_of(x, slice(0, 1)))
    return mode.seen


def plain_jacobians(model: nn.Module, x: Any, names: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Jacobians with respect to the named parameters, by ordinary autograd; differentiable in ``x``.

    Args:
        model: The network, already in the mode in which it is to be evaluated.
        x: One batch of inputs.
        names: Names of the parameters.

    Returns:
        For each name ``(batch, …, outputs, *shape)``, and the outputs ``(batch, …, outputs)``.
    """
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: fixed[name].clone().requires_grad_(True) for name in names}
    outputs, rows = [], []
    with torch.enable_grad():
        for i in range(length_of(x)):
            f = torch.func.functional_call(model, {**fixed, **chosen}, (part_of(x, slice(i, i + 1)),))[0]
            outputs.append(f)
            rows.append([_gradients(value, list(chosen.values())) for value in f.flatten()])
    f = torch.stack(outputs)
    jacobians = {
        name: torch.stack([row[k] for example in rows for row in example]).reshape(*f.shape, *chosen[name].shape)
        for k, name in enumerate(chosen)
    }
    return jacobians, f


def _gradients(value: Tensor, params: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]


def per_example_jacobians(
    model: nn.Module, x: Any, names: list[str], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Jacobians of the outputs with respect to the named parameters alone, ``(batch, outputs, size)`` each."""
    if not names:
        return {}
    known = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name: known[name].detach() for name in names}

    def outputs(parameters: dict[str, Tensor], example: Any) -> Tensor:
        batch = rebuild_inputs(x, example, lambda t: t.unsqueeze(0))
        return torch.func.functional_call(model, parameters, (batch,)).flatten()

    try:
        jacobians = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(chosen, input_tensors(x))
    except RuntimeError as error:
        if not refuses_vmap(error):
            raise
        found, f = plain_jacobians(model, x, names)
        jacobians = {name: value.flatten(1, f.ndim - 1) for name, value in found.items()}
    return {name: value.detach().reshape(*value.shape[:2], -1).to(dtype) for name, value in jacobians.items()}


def refuses_vmap(error: RuntimeError) -> bool:
    """Whether a model cannot run under ``vmap``: its control flow looks at values, as that of attention masks does."""
    return str(error).startswith("vmap: It looks like you're")


def input_tensors(x: Any) -> Any:
    """The tensors of a batch of inputs, as :mod:`torch.func` takes them: a tensor, or a plain dictionary of tensors."""
    if isinstance(x, Mapping):
        return {key: value for key, value in x.items() if isinstance(value, Tensor)}
    return x


def rebuild_inputs(x: Any, tensors: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Inputs like ``x`` whose tensors are a function of others; what is no tensor stays."""
    if isinstance(x, Mapping):
        return {**x, **{key: function(value) for key, value in tensors.items()}}
    return function(tensors)
