"""Posteriors whose covariance is diagonal in a basis for each parameter: predictive variances parameter by parameter.

In a grid of scalar prior precisions, each parameter's share of the variances is known from as few values as its own largest
curvature allows: in deep networks that of most layers is far below the largest of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace.capture.blocks import Basis
from laplace.capture.variance import block_variance
from laplace.capture.weights import Weight
from laplace.interpolation import interpolations
from laplace.posterior.parametric import ParametricLaplace


class ByBlockLaplace(ParametricLaplace):
    """Base of the structures diag, Kron and EKFAC, each of which says what its bases and the variances in them are."""

    def _bases(self) -> list[Basis]:
        """In which the covariance is diagonal, by block."""
        raise NotImplementedError

    def _variances(self, priors: Sequence[Sequence[Tensor]]) -> list[Weight]:
        """The variances in these bases, by block, from prior precisions by block."""
        raise NotImplementedError

    def _by_block(self, prior_precision: Tensor) -> Sequence[Tensor]:
        """A prior precision by block."""
        raise NotImplementedError

    def _largest_curvatures(self) -> list[float]:
        """Bounds on the curvature in any direction, by block."""
        raise NotImplementedError

    def _largest_curvature(self) -> float:
        return max(self._largest_curvatures(), default=0.0)

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        priors = zip(*(self._by_block(value) for value in prior_precisions), strict=True)
        weights = self._variances(list(priors))
        blocks = self.sums_spec().blocks
        return block_variance(capture, blocks, self._bases(), weights, len(prior_precisions), diagonal)

    def _grid_variance(self, capture: Any, values: Sequence[float]) -> Tensor:
        between = interpolations(values, self._largest_curvatures())
        kind = {"dtype": self._dtype, "device": self._device}
        priors = [torch.as_tensor(values if b is None else b.nodes, **kind)[:, None].unbind() for b in between]
        mixed = [None if b is None else torch.from_numpy(b.coefficients(values)).to(**kind) for b in between]
        weights, blocks = self._variances(priors), self.sums_spec().blocks
        return block_variance(capture, blocks, self._bases(), weights, len(values), True, mixed)
