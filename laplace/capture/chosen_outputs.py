"""A capture of which some outputs alone are asked for: variances then take as many backward passes as these are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class ChosenOutputs:
    """A capture whose outputs are some of another's, ``(batch, chosen)``; all else is the other's.

    Attributes:
        f: The chosen outputs, without graph.
    """

    def __init__(self, capture, outputs: Sequence[int]):
        """Choose outputs by their indices in the flattened outputs of an example.

        Args:
            capture: Of the batch.
            outputs: Distinct indices.

        Raises:
            ValueError: If one is out of range or given twice, or there is none.
        """
        count = capture.f[0].numel()
        wrong = [index for index in outputs if not 0 <= index < count]
        if wrong or not len(outputs) or len(set(outputs)) < len(outputs):
            raise ValueError(
                f"outputs={list(outputs)}: give distinct indices, one at least, of the {count} outputs of an example"
                + (f"; {wrong[0]} is not in 0…{count - 1}." if wrong else ".")
            )
        self._capture = capture
        self._outputs = torch.tensor(list(outputs), device=capture.f.device)
        self.f = capture.f.flatten(1)[:, self._outputs]
        self.modules = capture.modules

    @property
    def dtype(self) -> torch.dtype:
        """Type in which inputs and gradients are handed out."""
        return self._capture.dtype

    @dtype.setter
    def dtype(self, value: torch.dtype) -> None:
        self._capture.dtype = value

    @property
    def width(self) -> int:
        """Elements that come out of the layers for one example."""
        return self._capture.width

    def inputs(self, layer: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Inputs of a layer, ``(batch, positions, in)``; of a range of examples."""
        return self._capture.inputs(layer, start, stop)

    def input_chunks(self, layer: str, elements: int) -> Iterator[Tensor]:
        """Inputs of a layer in chunks of examples."""
        return self._capture.input_chunks(layer, elements)

    def single_input(self, layer: str) -> Tensor | None:
        """What went into a layer, as it was."""
        return self._capture.single_input(layer)

    def gradients(self, v: Tensor) -> dict[str, Tensor]:
        """Output gradients of every layer along a direction in the chosen outputs, ``(batch, chosen)``."""
        whole = torch.zeros(len(v), self._capture.f[0].numel(), dtype=v.dtype, device=v.device)
        whole[:, self._outputs] = v
        return self._capture.gradients(whole.reshape(self._capture.f.shape))
