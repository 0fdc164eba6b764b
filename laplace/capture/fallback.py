"""Per-example Jacobians by :mod:`torch.func`, and by plain automatic differentiation where that fails or is wrong.

``vmap`` cannot run recurrent layers, assignments by a mask, branches on values, custom functions and more; one example and
one output at a time, ordinary autograd can.

The batching rules of ``torch.func`` for the backward passes of ``layer_norm``, and of batch and instance norm by the batch's
own statistics, take the saved mean and deviation for constants (see pytorch/functorch issue 534): the Jacobian is right, its
derivative is not, and nothing says so. Networks that call these are therefore differentiated by ordinary autograd, one example
and one output at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace.capture.agreement import add_up
from laplace.capture.caches import kept_attributes
from laplace.capture.stateless import with_tensors
from laplace.data.batches import length_of, part_of
from laplace.linalg.precision import coarsest, without_autocast
from laplace.noise import fixed_directions

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
    """Whether a forward pass normalises by statistics of its inputs, as ``layer_norm`` does.

    With gradients, as those that are differentiated: without them, encoders are one operation that hides its parts.
    """
    with torch.enable_grad(), _LayerNormSeen() as mode:
        model(part_of(x, slice(0, 1)))
    return mode.seen


def plain_jacobians(
    model: nn.Module, x: Any, names: Iterable[str], create_graph: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Jacobians with respect to the named parameters, by ordinary autograd through the model as it is.

    Args:
        model: The network, already in the mode in which it is to be evaluated.
        x: One batch of inputs.
        names: Names of the parameters, which have ``requires_grad``.
        create_graph: Whether the Jacobians are to be differentiable in ``x``.

    Returns:
        For each name ``(batch, …, outputs, *shape)``, and the outputs ``(batch, …, outputs)``.
    """
    outputs, rows = [], []
    with torch.enable_grad(), _own_parameters(model) if create_graph else nullcontext():
        known = dict(model.named_parameters(remove_duplicate=False))
        chosen = {name: known[name] for name in names}
        for i in range(length_of(x)):
            f = model(part_of(x, slice(i, i + 1)))[0]
            outputs.append(f)
            rows.append([_gradients(value, list(chosen.values()), create_graph) for value in f.flatten()])
            if not create_graph:
                outputs[-1] = f.detach()
    f = torch.stack(outputs)
    jacobians = {
        name: torch.stack([row[k] for example in rows for row in example]).reshape(*f.shape, *chosen[name].shape)
        for k, name in enumerate(chosen)
    }
    return jacobians, f


@contextmanager
def _own_parameters(model: nn.Module) -> Iterator[None]:
    """Run with copies of the parameters, so that what is differentiated later leaves no ``grad`` in the model's.

    They are set as attributes: recurrent layers then take them into the lists that they keep of their weights.
    """
    places = [(m, key, p) for m in model.modules() for key, p in list(m._parameters.items()) if p is not None]
    copies = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for _, _, p in places if p.requires_grad}
    try:
        for module, key, p in places:
            setattr(module, key, copies.get(id(p), p))
        yield
    finally:
        for module, key, p in places:
            setattr(module, key, p)


@without_autocast()
def _gradients(value: Tensor, params: list[Tensor], create_graph: bool) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in params]
    grads = torch.autograd.grad(value, params, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return [dense(g, p) for g, p in zip(grads, params, strict=True)]


def dense(g: Tensor | None, p: Tensor) -> Tensor:
    """A gradient as automatic differentiation gives it, dense and of a parameter's shape."""
    if g is None:
        return torch.zeros_like(p)
    return g.to_dense() if g.is_sparse else g


def jacobians(
    model: nn.Module, x: Any, names: Iterable[str], create_graph: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Jacobians as :func:`plain_jacobians` gives them, for all examples at once where ``vmap`` can.

    Raises:
        ValueError: If neither ``vmap`` nor plain autograd can; names the parameters and their modules.
    """
    names = list(names)
    refused: Exception | None = None
    if not (has_own_weight_lists(model) or (create_graph and calls_layer_norm(model, x))):
        try:
            found, f = _vmapped(model, x, names)
        except Exception as error:  # noqa: BLE001 - vmap refuses in many ways what plain autograd can do
            refused = error
        else:
            if _sums_agree(model, x, found):
                return found, f
    try:
        return plain_jacobians(model, x, names, create_graph)
    except RuntimeError as error:
        error.__cause__ = error.__cause__ or refused
        raise refusal(model, names, error) from error


def _sums_agree(model: nn.Module, x: Any, found: dict[str, Tensor]) -> bool:
    """Whether Jacobians, contracted with one direction, are the gradient of plain autograd; those of ``prelu`` are not."""
    known = dict(model.named_parameters(remove_duplicate=False))
    with torch.enable_grad():
        f = model(x)
    if not f.requires_grad:
        return False
    v = fixed_directions(f)
    truth = torch.autograd.grad(f, [known[name] for name in found], v, retain_graph=True, allow_unused=True)
    for js, g in zip(found.values(), truth, strict=True):
        rows = v.detach().reshape(-1, 1).to(js.dtype) * js.detach().reshape(v.numel(), -1)
        expected = dense(g, js[(0,) * f.ndim]).flatten()
        if not add_up(rows, expected, coarsest(f, expected)):
            return False
    return True


def _vmapped(model: nn.Module, x: Any, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    known = dict(model.named_parameters(remove_duplicate=False))

    def outputs(parameters: dict[str, Tensor], example: Any) -> tuple[Tensor, Tensor]:
        batch = rebuild_inputs(x, example, lambda t: t.unsqueeze(0))
        f = with_tensors(model, parameters, batch)[0]
        return f, f

    chosen = {name: known[name].detach() for name in names}
    with kept_attributes(model):
        return torch.func.vmap(torch.func.jacrev(outputs, has_aux=True), in_dims=(None, 0))(chosen, input_tensors(x))


def has_own_weight_lists(model: nn.Module) -> bool:
    """Whether modules keep lists of their weights, which parameters that ``torch.func`` puts in place do not reach."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def refusal(model: nn.Module, names: Iterable[str], error: Exception) -> ValueError:
    """What to say of parameters that cannot be differentiated; names them and their modules."""
    owners = [f"{name} ({type(model.get_submodule(name.rpartition('.')[0])).__name__})" for name in names]
    return ValueError(
        f"Neither torch.func.vmap nor plain autograd can differentiate the outputs of single examples with respect to "
        f"{', '.join(owners)}. Set requires_grad=False on these parameters, or change the operation that cannot be "
        f"differentiated: {error}"
    )


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
