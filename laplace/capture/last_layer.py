"""The last layer alone, in closed form: its inputs are the features, and directions are their own gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from laplace.capture.rules import gradients_by_position, inputs_by_position


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
