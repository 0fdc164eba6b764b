r"""Capture once, contract many: one forward pass that remembers what every contraction needs.

A capture holds, for every covered layer, the inputs :math:`a` of each of its calls, and gives the output gradients
:math:`g = (\partial f / \partial z)^\top v` for any direction :math:`v` in output space by one backward pass that stops at
the layers' outputs: no gradient of any weight is formed. Parameters without a covered layer get per-example Jacobians of
their own through :mod:`torch.func`.

The directions are taken one at a time rather than stacked under ``vmap``: on CPUs the batched convolution backward is an
order of magnitude slower, for linear layers the two are equal, and memory stays at one direction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.curvature.backprop import plain_jacobians
from laplace.curvature.layers import gradients_by_position, inputs_by_position


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate the model inside the block and leave every module's training flag as it was found."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Capture:
    """Outputs, layer inputs and output gradients of one batch.

    Attributes:
        f: Outputs ``(batch, …, outputs)`` without graph.
        jacobians: For every parameter without a covered layer, its Jacobian ``(batch, outputs, parameter size)``, where
            ``outputs`` counts all positions and classes.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor | MutableMapping[str, Any],
        layers: Iterable[str],
        others: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
    ):
        """Run the model on one batch.

        Args:
            model: The network, already in the mode in which it is to be evaluated.
            x: One batch of inputs.
            layers: Names of the covered modules.
            others: Names of the parameters that need Jacobians of their own.
            dtype: Type in which inputs and gradients are handed out.
        """
        self.dtype = dtype
        self.modules = {name: model.get_submodule(name) for name in layers}
        self._forward(model, x)
        self.f = self._output.detach()
        self.jacobians = per_example_jacobians(model, x, list(others), dtype)
        self._inputs: dict[str, Tensor] = {}

    def _forward(self, model: nn.Module, x: Any) -> None:
        self._calls: list[tuple[str, Tensor, Any]] = []

        def remember(name: str):
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
                value = (args[0] if args else kwargs["input"]).detach()
                # The edge, not the tensor: a later in-place operation may change what the tensor stands for.
                self._calls.append((name, value, torch.autograd.graph.get_gradient_edge(output)))

            return hook

        handles = [m.register_forward_hook(remember(n), with_kwargs=True) for n, m in self.modules.items()]
        try:
            with torch.enable_grad():
                self._output = model(x)
        finally:
            for handle in handles:
                handle.remove()

    @property
    def called(self) -> set[str]:
        """Names of the covered modules that ran."""
        return {name for name, _, _ in self._calls}

    def inputs(self, layer: str) -> Tensor:
        """Inputs of a layer over all its calls, ``(batch, positions, in)``."""
        if layer not in self._inputs:
            self._inputs[layer] = next(self.input_chunks(layer, sys.maxsize))
        return self._inputs[layer]

    def input_chunks(self, layer: str, elements: int) -> Iterator[Tensor]:
        """Inputs of a layer as :meth:`inputs`, in chunks of examples of about so many elements."""
        module, n = self.modules[layer], len(self.f)
        calls = [self._by_example(value) for name, value, _ in self._calls if name == layer]
        one = sum(inputs_by_position(module, value[:1].flatten(0, 1)).numel() for value in calls)
        for start, stop in ranges(n, one, elements):
            parts = []
            for value in calls:
                a = inputs_by_position(module, value[start:stop].flatten(0, 1)).to(self.dtype)
                parts.append(_join_positions(a, stop - start))
            yield parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _by_example(self, value: Tensor) -> Tensor:
        """A layer's input or output as ``(batch, parts, …)``.

        Models may fold positions into the batch, as ``x.flatten(0, 1)`` does; then every example has several parts. Where
        the fold is of another order, the check against automatic differentiation finds out.
        """
        n = len(self.f)
        return value.unflatten(0, (n, len(value) // n)) if len(value) % n == 0 else value[None]

    def gradients(self, v: Tensor) -> dict[str, Tensor]:
        """Output gradients of every layer for one direction.

        Args:
            v: Direction in output space, shaped like :attr:`f`.

        Returns:
            ``(batch, positions, out)`` by layer.
        """
        if not self._calls:
            return {}
        edges = [edge for _, _, edge in self._calls]
        grads = torch.autograd.grad(self._output, edges, v.to(self._output.dtype), retain_graph=True, allow_unused=True)
        found: dict[str, list[Tensor]] = {}
        for (name, _, _), g in zip(self._calls, grads, strict=True):
            if g is None:
                raise ValueError(
                    f"The output of layer {name!r} does not influence the model's output, so its curvature is zero. "
                    "Set requires_grad=False on its parameters to leave them out."
                )
            g = gradients_by_position(self.modules[name], g).to(self.dtype)
            found.setdefault(name, []).append(_join_positions(g, len(self.f)))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in found.items()}


class LastLayerCapture:
    """The capture of a model's linear last layer: its features, and directions that are their own gradients."""

    def __init__(self, features: Tensor, layer: nn.Module, name: str, dtype: torch.dtype):
        """Apply the last layer to features ``(batch, …, in)``."""
        self.dtype = dtype
        self.modules = {name: layer}
        self._name = name
        self._features = features
        self.f = layer(features).detach()
        self.jacobians: dict[str, Tensor] = {}

    def inputs(self, layer: str) -> Tensor:
        """Features, ``(batch, positions, in)``."""
        return inputs_by_position(self.modules[layer], self._features).to(self.dtype)

    def input_chunks(self, layer: str, elements: int) -> Iterator[Tensor]:
        """All features at once; they exist already."""
        yield self.inputs(layer)

    def gradients(self, v: Tensor) -> dict[str, Tensor]:
        """The direction itself, ``(batch, positions, out)``."""
        return {self._name: gradients_by_position(self.modules[self._name], v).to(self.dtype)}


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


def _join_positions(values: Tensor, n: int) -> Tensor:
    """``(batch · parts, positions, width)`` as ``(batch, parts · positions, width)``."""
    if len(values) == n or len(values) % n != 0:
        return values
    return values.reshape(n, -1, values.shape[-1])


def ranges(n: int, each: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``n`` items of ``each`` elements in steps of about ``elements`` elements."""
    step = max(1, elements // max(1, each))
    for start in range(0, n, step):
        yield start, min(start + step, n)


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
