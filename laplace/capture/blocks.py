"""One parameter's place in the curvature: where it is captured, and which sums it goes into."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


def row_key(parameter: str) -> str:
    """Where the rows of a parameter without a layer stand among gradients, which are by layer; a layer may have its name."""
    return f"{parameter}/row"


@dataclass(frozen=True)
class Basis:
    """Orthonormal bases in which one parameter's covariance is diagonal; None stands for the identity.

    Attributes:
        left: Over the weight's first dimension, ``(out, out)``.
        right: Over its others, ``(in, in)``.
    """

    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """How one parameter's curvature is obtained.

    Attributes:
        parameter: Name of the parameter in the model.
        shape: Its shape.
        layer: Name of the module whose captured inputs and output gradients give its curvature, or None where per-example
            automatic differentiation of this parameter does.
        factors: Names of its sums; of Kronecker factors, that over the weight's first dimension first.
        reason: Why it is treated in this way, in words; shown in the coverage report. Sums whose words differ are the same.
        chosen: Flat indices of the entries that a subnetwork keeps; None for all.
        basis: Names of the orthonormal matrices in whose basis its sum is taken, that over the weight's first dimension first;
            none where it is taken as it is.
    """

    parameter: str
    shape: tuple[int, ...]
    layer: str | None
    factors: tuple[str, ...]
    reason: str = field(compare=False)
    chosen: tuple[int, ...] | None = None
    basis: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries that are kept."""
        return torch.Size(self.shape).numel() if self.chosen is None else len(self.chosen)

    @property
    def has_factors(self) -> bool:
        """Whether its sums are Kronecker factors."""
        return self.factors[0].endswith(("/A", "/B"))

    @cached_property
    def indices(self) -> Tensor:
        """``chosen`` as a tensor on the host."""
        return torch.tensor(self.chosen, device="cpu")
