"""The project's own backend: capture once, contract many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.capture import contractions
from laplace.data.batches import joined, length_of
from laplace.linalg.kronecker import Kron
from laplace.structures.diag import diag_vector
from laplace.structures.registry import add_curvature_
from laplace.structures.sums import CurvatureSums


class _Native:
    """Contractions in place of dense Jacobians; the estimator's directions come from the sibling class."""

    def accumulate(self, sums: CurvatureSums, x: Any, y: Tensor, offset: int = 0) -> None:
        """Add one batch to raw sums in place.

        Args:
            sums: The state to add to.
            x: Inputs ``(batch, …)`` or a dict-like batch.
            y: Targets: class labels ``(batch, …)`` or values ``(batch, outputs)``.
            offset: Index in the data set of the batch's first example; names examples in errors and seeds their noise.

        Raises:
            NonFiniteError: If an output or target is NaN or Inf; names the examples. The sums are unchanged.
            ValueError: If the targets do not fit the outputs. The sums are unchanged.
        """
        self.spec = sums.spec
        capture = self.capture(x)
        y = y.to(capture.f.device)
        self.likelihood_object.check(capture.f, y, offset)
        f = capture.f.double()  # in float32, 1 - p of a sure example has no digits
        add_curvature_(sums, capture, self.directions(f, y, offset))
        sums.loss = sums.loss + self.likelihood_object.loss(f, y)
        sums.n_data += len(y)

    def _sums(self, structure: str, x: Any, y: Tensor) -> CurvatureSums:
        if self.spec is None or self.spec.structure != structure:
            self.initialize(x, structure)
        sums = CurvatureSums.zero(self.spec, self.params[0].device)
        self.accumulate(sums, x, y)
        return sums

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Dense Jacobians ``(batch, outputs, parameters)`` and outputs."""
        if enable_backprop:
            return self.functorch_jacobians(x, enable_backprop)
        if self.spec is None:
            self.initialize(x, "diag")
        blocks = self.spec.blocks
        size, dtype = sum(block.size for block in blocks), self.spec.torch_dtype
        contractions.require_jacobians(length_of(x), self._outputs_per_example(x), size, dtype, self.params[0].device)
        found = []
        for _, inputs in self.parts(x):
            capture = self.capture(inputs)
            found.append((torch.cat(list(contractions.jacobian_chunks(capture, blocks))), capture.f))
        js, f = joined(found)
        return js, f

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense curvature of one batch ``(parameters, parameters)``."""
        sums = self._sums("full", x, y)
        return sums.loss, sums.tensors["full"].to(sums.spec.torch_dtype)

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Kronecker factors of one batch, their input side divided by ``N``."""
        sums = self._sums("kron", x, y)
        return sums.loss, Kron.from_sums(sums, N)

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Diagonal curvature of one batch ``(parameters,)``."""
        sums = self._sums("diag", x, y)
        return sums.loss, diag_vector(sums)


class NativeGGN(_Native, GGNInterface):
    """Exact GGN, or with ``stochastic=True`` its Monte-Carlo Fisher estimate."""


class NativeEF(_Native, EFInterface):
    """Empirical Fisher."""
