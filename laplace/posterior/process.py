r"""Algebra of the Gaussian process that a linearised network is, from the eigenvectors of its training kernel.

Linearised at the MAP, the network is a Gaussian process with kernel :math:`k(x, x') = \delta^{-1} J(x) J(x')^\top` (Khan et
al., "Approximate inference turns deep networks into Gaussian processes", NeurIPS 2019; Immer et al., "Improving predictions of
Bayesian neural nets via local linearization", AISTATS 2021). With roots :math:`V_n V_n^\top = \Lambda_n` of the output Hessians
of :math:`M` training examples, :math:`W = V^\top J J^\top V` and :math:`h = \tfrac{N}{M} / (\sigma^2 T)`,

.. math:: J_* P^{-1} J_*^\top = \tfrac1\delta \left[ J_* J_*^\top
    - J_* J^\top V \left(\tfrac\delta h I + W\right)^{-1} V^\top J J_*^\top \right], \qquad
    \log\frac{\det P}{\det P_0} = \sum_i \log\left(1 + \tfrac h\delta \lambda_i(W)\right) ,

which is Woodbury's identity for :math:`P = h J^\top \Lambda J + \delta I`: with all of the data it is the dense posterior
exactly. One eigendecomposition of :math:`W` serves every prior precision and noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace.capture.blocks import Basis
from laplace.capture.contractions import output_directions
from laplace.capture.variance import block_variance
from laplace.capture.weights import constant
from laplace.errors import NotFittedError
from laplace.linalg import memory
from laplace.linalg.precision import widened
from laplace.posterior.parametric import ParametricLaplace
from laplace.posterior.refusals import NoWeights
from laplace.structures import gp


class ConditionedProcess(NoWeights, ParametricLaplace):
    """Base of :class:`FunctionalLaplace`: what follows from rows of the training examples and their kernel's eigenvectors."""

    structure = "gp"
    independent_outputs: bool
    spectrum: Tensor | None = None
    _vectors: Tensor | None = None
    _rows: gp.Rows
    _subset: list[tuple[Any, Tensor]]

    def _check_fitted(self) -> None:
        if self.spectrum is None:
            raise NotFittedError(f"{type(self).__name__} has not been fitted: call fit(train_loader) first.")

    def _check_prior_structure(self, value: Tensor) -> None:
        if len(value) != 1:
            raise ValueError(
                f"A functional (GP) posterior takes a scalar prior precision, not one of {len(value)} values: its kernel is "
                "computed once, for every prior. Use hessian_structure='full', 'kron' or 'diag'."
            )

    @property
    def _curvature_factor(self) -> Tensor:
        """Scale of the subset's curvature, ``h``."""
        size = sum(len(y) for _, y in self._subset)
        return self._H_factor.double() * (self.n_data / size)

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`."""
        self._check_fitted()
        return (1 + self._curvature_factor * self.spectrum / self.prior_precision.double()).log().sum()

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P` of the precision over the weights."""
        return self.log_det_ratio + self.log_det_prior_precision

    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` for ``(batch, outputs, parameters)``, giving ``(batch, outputs, outputs)``."""
        Js = widened(Js)
        self._check_fitted()
        rows = gp.rows_of_jacobian(Js, self._spec.blocks, self._rows)
        prior = Js.double() @ Js.double().mT
        if self.independent_outputs:
            prior = prior.diagonal(dim1=-2, dim2=-1)
        cross = self._projected(rows, len(Js))
        variance = self._variance(prior, cross, self.prior_precision, diagonal=self.independent_outputs)
        return (torch.diag_embed(variance) if self.independent_outputs else variance).to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly for ``(batch · outputs, parameters)``, as of a Gaussian process."""
        Js = widened(Js)
        if not self.independent_outputs:
            return self.functional_variance(Js[None])[0]
        self._check_fitted()
        outputs = len(self.spectrum)
        js = Js.unflatten(0, (-1, outputs)).transpose(0, 1)  # each output is a process: its examples covary
        prior = js.double() @ js.double().mT
        cross = self._projected(gp.rows_of_jacobian(js.transpose(0, 1), self._spec.blocks, self._rows), js.shape[1])
        weights = self._weights(self.prior_precision)
        cross = cross.transpose(0, 1)
        each = (prior - (cross * weights[:, None]) @ cross.mT) / self.prior_precision.double()
        placed = torch.einsum("cnm,cd->ncmd", each, torch.eye(outputs, dtype=each.dtype, device=each.device))
        return placed.flatten(2, 3).flatten(0, 1).to(Js.dtype)

    def _projected(self, rows: gp.Rows, n: int) -> Tensor:
        """Test rows against the eigenvectors of the training kernel, ``(batch, outputs, size)``."""
        projected = self._gram(rows, self._rows) @ self._vectors
        return projected.transpose(0, 1) if self.independent_outputs else projected[0].unflatten(0, (n, -1))

    def _weights(self, prior_precision: Tensor) -> Tensor:
        r""":math:`(\delta/h + \lambda)^{-1}`, ``(processes, size)``."""
        return (prior_precision.double() / self._curvature_factor + self.spectrum).reciprocal()

    def _variance(self, prior: Tensor, cross: Tensor, prior_precision: Tensor, diagonal: bool) -> Tensor:
        """Variances ``(batch, outputs)`` or covariances from those of the unit prior and the projected rows."""
        scaled = cross * self._weights(prior_precision)
        known = (scaled * cross).sum(-1) if diagonal else scaled @ cross.mT
        return (prior - known) / prior_precision.double()

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        """Prior variance minus what the data took away; all priors share what depends on the batch."""
        dtype, capture.dtype = capture.dtype, torch.float64
        blocks = self._spec.blocks
        only_diagonal = diagonal or self.independent_outputs
        widths = [max(b.shape[0], 1) if b.shape else 1 for b in blocks]
        ones = [capture.f.new_ones(w, b.size // w, dtype=torch.float64) for w, b in zip(widths, blocks, strict=True)]
        weights = [constant(w) for w in ones]
        prior = block_variance(capture, blocks, [Basis()] * len(blocks), weights, 1, only_diagonal)[0]
        rows = gp.rows_of(capture, blocks, output_directions(capture.f))
        cross = self._projected(rows, len(capture.f))
        found = torch.stack([self._variance(prior, cross, value, only_diagonal) for value in prior_precisions])
        return (found if diagonal == only_diagonal else torch.diag_embed(found)).to(dtype)

    def _gram(self, one: gp.Rows, two: gp.Rows) -> Tensor:
        """Inner products of all rows: ``(1, n · k, m · l)``, or ``(outputs, n, m)`` of independent ones."""
        (n, k), (m, width) = (gp.shape_of(rows) for rows in (one, two))
        size = (k, n, m) if self.independent_outputs else (n * k, m * width)
        memory.require(
            3 * memory.tensor_bytes(*size),
            self._device,
            f"The kernel of {n} against {m} examples",
            "Lower n_subset or the batch size, or set independent_outputs=True.",
        )
        if self.independent_outputs:
            return gp.gram(one, two, paired=True)
        return gp.gram(one, two).flatten(2, 3).flatten(0, 1)[None]
