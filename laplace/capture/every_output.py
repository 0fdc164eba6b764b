"""Output gradients along the unit direction of every output, one backward pass each; of a single example several at once.

A backward pass of one example takes most of its time in starting its operations. So one example is run in copies, each of which
is given a direction of its own: that costs a forward pass more, and makes as many times fewer backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace.capture.capture import Capture
from laplace.capture.contractions import output_directions
from laplace.linalg.memory import at_once

_TOGETHER = 1 << 22  # elements that come out of the layers for all copies
_FEWEST = 8  # copies that are worth a forward pass more; of fewer outputs, one backward pass each costs less


class OutputGradients:
    """Gradients of what comes out of one layer, of every output, which are put side by side for a few examples at a time.

    Args:
        parts: ``(batch, positions, out)`` of each output; or of all of them ``(batch, outputs, positions, out)``.

    Attributes:
        shape: ``(batch, outputs, positions, out)``.
    """

    def __init__(self, parts: Sequence[Tensor] | Tensor) -> None:
        """See the class."""
        self._parts = parts
        whole = isinstance(parts, Tensor)
        self.shape = parts.shape if whole else torch.Size((len(parts[0]), len(parts), *parts[0].shape[1:]))

    def of(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Those of a range of examples, in the memory of which rows are made without a copy."""
        if isinstance(self._parts, Tensor):
            return self._parts[start:stop]
        parts = [g[start:stop] for g in self._parts]
        if parts[0].stride(1) == 1 and parts[0].stride(2) != 1:  # channels first
            return torch.stack([g.mT for g in parts], 1).mT
        return torch.stack(parts, 2).transpose(1, 2)

    def sums(self) -> Tensor:
        """Sums over the positions, ``(batch, outputs, out)``."""
        if isinstance(self._parts, Tensor):
            return self._parts.sum(2)
        return torch.stack([g.sum(1) for g in self._parts], 1)


def gradients_of_outputs(capture: Any) -> dict[str, OutputGradients | Tensor]:
    """As :meth:`laplace.capture.capture.Capture.gradients`, for every output.

    Returns:
        By layer, and ``(batch, outputs, size)`` by :func:`laplace.capture.blocks.row_key`.
    """
    directions = list(output_directions(capture.f))
    copies = _copies(capture, len(directions))
    if copies is not None:
        return _of_copies(copies, torch.cat(directions))
    found = [capture.gradients(v) for v in directions]
    return {name: _joined([gradients.pop(name) for gradients in found]) for name in list(found[0])}


def _joined(gradients: list[Tensor]) -> OutputGradients | Tensor:
    return torch.stack(gradients, 1) if gradients[0].ndim == 2 else OutputGradients(gradients)


def _copies(capture: Any, outputs: int) -> Capture | None:
    """A capture of copies of one example; None where they save nothing, or the model answers otherwise for them."""
    if not isinstance(capture, Capture) or len(capture.f) > 1 or capture.watch is not None or not capture.width:
        return None
    count = min(outputs, at_once(_TOGETHER, capture.f.device) // capture.width)
    if count < _FEWEST:
        return None
    copies, f = capture.of_copies(count), capture.f.double()
    if copies is None or copies.f.shape != (count, *f.shape[1:]):
        return None
    off = (copies.f.double() - f).abs().max()
    return copies if bool(off <= 1e3 * capture.coarsest * f.abs().max()) else None


def _of_copies(copies: Capture, directions: Tensor) -> dict[str, OutputGradients | Tensor]:
    """Gradients of one example along ``(directions, …)``, as many at once as there are copies."""
    count, found = len(copies.f), []
    for part in directions.split(count):
        v = torch.zeros_like(copies.f)
        v[: len(part)] = part
        found.append({name: g[: len(part)] for name, g in copies.gradients(v).items()})
    whole = {name: torch.cat([gradients.pop(name) for gradients in found])[None] for name in list(found[0])}
    return {name: g if g.ndim == 3 else OutputGradients(g) for name, g in whole.items()}
