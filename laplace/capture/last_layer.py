"""The last layer alone, in closed form: its inputs are the features, and directions are their own gradients.

That holds of a layer that multiplies its weight by what it is given. Of one that is re-parametrised, pruned, or changed by
hooks, the parameters are differentiated one example at a time, as those of any other module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.blocks import row_key
from laplace.capture.calls import input_of
from laplace.capture.capture import Capture
from laplace.capture.feature_extractor import FeatureExtractor
from laplace.capture.padding import kept_tokens
from laplace.capture.pullback import pullback
from laplace.capture.rules import gradients_by_position, inputs_by_position
from laplace.capture.verify import Source, find_layers
from laplace.linalg.matmul import faster_products
from laplace.noise import fixed_directions


def last_layer_sources(layer: nn.Module, name: str, names: Iterable[str], features: Tensor) -> dict[str, Source]:
    """Decide for each parameter of the last layer whether the closed form gives its curvature.

    Args:
        layer: The last layer.
        name: Its name in the model.
        names: The parameters, by their names in the model.
        features: A few of its inputs, before its own hooks.

    Returns:
        The source of every parameter's curvature by name.
    """
    prefix = f"{name}."
    found = find_layers(layer, [full.removeprefix(prefix) for full in names], features, by_products=False)
    if any(source.layer is not None for source in found.values()) and not _ends_in_its_product(layer, features):
        aside = Source(None, f"per-example autograd: {type(layer).__name__} changes its product, or that gradient")
        found = {local: aside if source.layer is not None else source for local, source in found.items()}
    return {
        prefix + local: source if source.layer is None else Source(name, "last layer", source.kind)
        for local, source in found.items()
    }


def _ends_in_its_product(layer: nn.Module, features: Tensor) -> bool:
    """Whether directions reach the layer's product as they are: a class with a call of its own, or a hook, may change them."""
    capture = Capture(layer, features, [""])
    v = fixed_directions(capture.f)
    return all(g.shape == v.shape and torch.equal(g.to(v), v) for _, g in capture.output_gradients(v))


class LastLayerCapture:
    """The capture of a model's linear last layer: its features, and directions that are their own gradients.

    Attributes:
        f: Outputs ``(batch, …, outputs)`` without graph.
        modules: The layer by its name.
        kept_tokens: As of :class:`laplace.capture.capture.Capture`.
    """

    def __init__(
        self,
        features: Tensor,
        layer: nn.Module,
        name: str,
        dtype: torch.dtype,
        others: Iterable[str] = (),
        kept_tokens: Tensor | None = None,
        call: tuple[Tensor, Tensor] | None = None,
    ):
        """Apply the last layer to features ``(batch, …, in)``, unless it was called on them.

        Args:
            features: Its inputs, before its own hooks.
            layer: The last layer.
            name: Its name.
            dtype: Type in which inputs and gradients are handed out.
            others: Its parameters without a closed form.
            kept_tokens: See the class.
            call: What its weight was multiplied by, and what came out, if the layer was called on these features.
        """
        self.dtype = dtype
        self.kept_tokens = kept_tokens
        self.modules = {name: layer}
        self._name = name
        f, self._features = apply_last_layer(layer, features) if call is None else reversed(call)
        self.f = f.detach()
        prefix = f"{name}."
        self._rows = pullback(layer, features, [other.removeprefix(prefix) for other in others])

    @property
    def width(self) -> int:
        """Elements that come out of the layer for one example."""
        return self.f[0].numel()

    def inputs(self, layer: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Features, ``(batch, positions, in)``; of a range of examples."""
        return inputs_by_position(self.modules[layer], self._features[start:stop]).to(self.dtype)

    def input_chunks(self, layer: str, elements: int) -> Iterator[Tensor]:
        """All features at once; they exist already."""
        yield self.inputs(layer)

    def single_input(self, layer: str) -> Tensor | None:
        """The features as they are; None where they are no batch of the examples."""
        return self._features.to(self.dtype) if len(self._features) == len(self.f) else None

    def gradients(self, v: Tensor) -> dict[str, Tensor]:
        """The direction itself, ``(batch, positions, out)``, and the rows of parameters without a closed form."""
        rows = {
            row_key(f"{self._name}.{local}"): row.reshape(len(row), -1).to(self.dtype)
            for local, row in self._rows(v).items()
        }
        return {self._name: gradients_by_position(self.modules[self._name], v).to(self.dtype), **rows}


@torch.no_grad()
def capture_last_layer(
    extractor: FeatureExtractor, x: Any, dtype: torch.dtype, others: Sequence[str] = ()
) -> LastLayerCapture:
    """The capture of one batch; the layer is applied once more only where that has to show that nothing follows it.

    Args:
        extractor: The model and its last layer.
        x: Inputs.
        dtype: Type in which inputs and gradients are handed out.
        others: Parameters of the last layer without a closed form.

    Raises:
        ValueError: If the model's output is not that of its last layer.
    """
    with faster_products(extractor.model.parameters()):
        out, features, call = extractor.forward_with_call(x)
    name, layer = extractor.last_layer_name, extractor.last_layer
    call = None if others else call  # of others the features themselves are needed, as they were
    capture = LastLayerCapture(features.detach(), layer, name, dtype, others, kept_tokens(x), call)
    if call is None:
        extractor.check_output(capture.f, out)
    return capture


def apply_last_layer(layer: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the last layer, and what its weight was multiplied by: the features after hooks that change them."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda module, args, kwargs, output: kept.append(input_of(args, kwargs)), with_kwargs=True
    )
    try:
        return layer(features), kept[-1]
    finally:
        handle.remove()
