r"""Capture once, contract many: one forward pass that remembers what every contraction needs.

A capture holds, for every covered layer, the inputs :math:`a` of each of its calls, and gives the output gradients
:math:`g = (\partial f / \partial z)^\top v` for any direction :math:`v` in output space by one backward pass that stops at
the layers' outputs: no gradient of any weight is formed. Parameters without a covered layer get per-example Jacobians of
their own through :mod:`torch.func`.

The directions are taken one at a time rather than stacked under ``vmap``: on CPUs the batched convolution backward is an
order of magnitude slower, for linear layers the two are equal, and memory stays at one direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
            parts = [
                inputs_by_position(self.modules[layer], value).to(self.dtype)
                for name, value, _ in self._calls
                if name == layer
            ]
            self._inputs[layer] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return self._inputs[layer]

    def input_chunks(self, layer: str, elements: int) -> Iterator[Tensor]:
        """Inputs of a layer as :meth:`inputs`, in chunks of examples of about so many elements."""
        module = self.modules[layer]
        calls = [value for name, value, _ in self._calls if name == layer]
        one = sum(inputs_by_position(module, value[:1]).numel() for value in calls)
        for start, stop in ranges(len(self.f), one, elements):
            parts = [inputs_by_position(module, value[start:stop]).to(self.dtype) for value in calls]
            yield parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def gradients(self, v: Tensor, last: bool = False) -> dict[str, Tensor]:
        """Output gradients of every layer for one direction.

        Args:
            v: Direction in output space, shaped like :attr:`f`.
            last: Free the graph; no further direction can follow.

        Returns:
            ``(batch, positions, out)`` by layer.
        """
        if not self._calls:
            return {}
        edges = [edge for _, _, edge in self._calls]
        grads = torch.autograd.grad(
            self._output, edges, v.to(self._output.dtype), retain_graph=not last, allow_unused=True
        )
        found: dict[str, list[Tensor]] = {}
        for (name, _, _), g in zip(self._calls, grads, strict=True):
            if g is None:
                raise ValueError(
                    f"The output of layer {name!r} does not influence the model's output, so its curvature is zero. "
                    "Set requires_grad=False on its parameters to leave them out."
                )
            found.setdefault(name, []).append(gradients_by_position(self.modules[name], g).to(self.dtype))
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

    def gradients(self, v: Tensor, last: bool = False) -> dict[str, Tensor]:
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
        batch = _map_tensors(example, lambda t: t.unsqueeze(0))
        return torch.func.functional_call(model, parameters, (batch,)).flatten()

    in_dims = (None, _map_tensors(x, lambda _: 0))
    jacobians = torch.func.vmap(torch.func.jacrev(outputs), in_dims=in_dims)(chosen, x)
    return {name: value.detach().flatten(2).to(dtype) for name, value in jacobians.items()}


def ranges(n: int, each: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``n`` items of ``each`` elements in steps of about ``elements`` elements."""
    step = max(1, elements // max(1, each))
    for start in range(0, n, step):
        yield start, min(start + step, n)


def _map_tensors(x: Any, function: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: function(value) if isinstance(value, Tensor) else value for key, value in x.items()}
    return function(x)
