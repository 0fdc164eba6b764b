"""Train: the gradient of a part of a batch, and the curvature of a segment, at weights that the driver sends along.

Both are functions of the task alone and commit nothing: their receipts hold the result, which the driver adds up in the order
of the plan. What is lost or done twice changes no bit; what is committed is the state after every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from laplace.empirical_bayes import part_of_batch, set_weights
from laplace.linalg.dense import parameter_vector
from laplace_dist.plan.segments import Segment
from laplace_dist.stages.context import Context


@dataclass(frozen=True)
class Gradient:
    """Find loss and gradient of a part of a batch.

    Attributes:
        plan: Digest of the plan.
        number: Of the part in its batch.
        epoch: Of the training.
        start: First example.
        stop: One past the last example.
        seed: Of what is random in the part.
        weights: Bytes of the parameter vector.
    """

    plan: str
    number: int
    epoch: int
    start: int
    stop: int
    seed: int
    weights: bytes

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"gradient of examples {self.start} to {self.stop - 1} in epoch {self.epoch}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        _take(context, self.weights)
        ((_, x, y),) = context.batches("train", context.plan.data, self.start, self.stop)
        part = part_of_batch(context.la, x, y, self.seed)
        found = {"loss": part.loss, "factor": part.factor, "gradient": part.gradient.cpu().numpy(), "n": part.n}
        return {"number": self.number, **found}


@dataclass(frozen=True)
class Curvature:
    """Find the raw sums of a segment.

    Attributes:
        plan: Digest of the plan.
        number: Of the segment in the plan.
        epoch: Of the training.
        segment: The segment.
        weights: Bytes of the parameter vector.
    """

    plan: str
    number: int
    epoch: int
    segment: Segment
    weights: bytes

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"curvature of segment {self.segment} after epoch {self.epoch}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        _take(context, self.weights)
        sums = context.la.zero_sums()
        for offset, x, y in context.batches("train", context.plan.data, self.segment.start, self.segment.stop):
            context.la.accumulate(sums, x, y, offset=offset)
        tensors = {name: value.cpu().numpy() for name, value in sums.to_tensors().items()}
        return {"number": self.number, "tensors": tensors, "n_data": sums.n_data}


class InOrder:
    """Adds up receipts in the order of their tasks as they come; only those that come early are kept.

    Args:
        add: Returns a total with a receipt added to it; the total is None before the first one.

    Attributes:
        value: The total.
    """

    def __init__(self, add: Callable[[Any, Mapping[str, Any]], Any]) -> None:
        self.value: Any = None
        self._add, self._next = add, 0
        self._early: dict[int, Mapping[str, Any]] = {}

    def take(self, receipt: Mapping[str, Any]) -> None:
        """Add a receipt, or keep it until those before it are there."""
        self._early[receipt["number"]] = receipt
        while self._next in self._early:
            self.value = self._add(self.value, self._early.pop(self._next))
            self._next += 1


def bytes_of(vector: torch.Tensor) -> bytes:
    """Return a parameter vector as a task carries it, in float32 at least."""
    return vector.detach().to(_carried(vector.dtype)).cpu().numpy().tobytes()


def _carried(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _take(context: Context, weights: bytes) -> None:
    """Give the worker's model the weights that came with a task."""
    la = context.la
    dtype = _carried(parameter_vector([p.detach().flatten()[:0] for p in la.params]).dtype)
    set_weights(la, torch.frombuffer(bytearray(weights), dtype=dtype).to(la.params[0].device))
