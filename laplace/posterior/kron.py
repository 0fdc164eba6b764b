r"""Kronecker-factored posterior: :math:`P = \bigoplus_l \left(B_l \otimes A_l / (\sigma^2 T) + \delta_l I\right)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.capture.variance import Basis, block_variance
from laplace.linalg.decomposed import KronDecomposed, KronSpectrum
from laplace.linalg.kronecker import Kron
from laplace.noise import check_samples
from laplace.posterior.arguments import before, by_name
from laplace.posterior.parametric import ParametricLaplace
from laplace.structures.sums import CurvatureSums


class KronLaplace(ParametricLaplace):
    r"""Laplace approximation with Kronecker-factored curvature.

    The input side of the summed factors is divided by the number of examples here and nowhere else:
    :math:`H_l \approx \sum_n g_n g_n^\top \otimes \tfrac1N \sum_n a_n a_n^\top` for a weight, and
    :math:`\sum_n g_n g_n^\top` for a bias.

    Args:
        damping: Add the root of the prior precision to each factor's eigenvalues instead of the prior precision to
            their products.
        **kwargs: As for :class:`laplace.BaseLaplace`.

    Attributes:
        H_facs: Kronecker factors of the summed curvature, :class:`laplace.utils.matrix.Kron`.
        H: Their eigendecomposition, :class:`laplace.utils.matrix.KronDecomposed`, made on first use.
    """

    structure = "kron"

    order = before(ParametricLaplace.order, "backend_kwargs", "damping")

    @by_name
    def __init__(self, *, damping: bool = False, **kwargs: Any):
        """See the class."""
        self.damping = damping
        self.H_facs: Kron | None = None
        self._decomposed: KronDecomposed | None = None
        self._eigenvalues: KronSpectrum | None = None
        super().__init__(**kwargs)

    @property
    def damping(self) -> bool:
        """Whether the root of the prior precision is added to each factor's eigenvalues."""
        return self._damping

    @damping.setter
    def damping(self, value: bool) -> None:
        self._damping = bool(value)
        known = getattr(self, "_decomposed", None)
        if known is not None:
            self._decomposed = KronDecomposed(known.eigenvectors, known.eigenvalues, known.deltas, self._damping)
        self._eigenvalues = None

    def _settings(self) -> tuple[str, ...]:
        return (*super()._settings(), "damping")

    def _finalize(self, sums: CurvatureSums) -> None:
        self.H_facs = Kron.from_sums(sums, sums.n_data)
        self._decomposed = self._eigenvalues = None

    @property
    def H(self) -> KronDecomposed | None:
        """Eigendecomposition of the summed curvature; zero before ``fit``."""
        if self._decomposed is None and self.H_facs is not None:
            self._decomposed = self.H_facs.decompose(damping=self.damping)
        if self._decomposed is None and self.params:
            parameters = [p if p.ndim else p[None] for p in self.params]
            return Kron.init_from_model(parameters, self._device, self._dtype).decompose(damping=self.damping)
        return self._decomposed

    def use_decompositions(self, known: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over eigenvalues and eigenvectors of factors by name, as :mod:`laplace.structures.decomposition` makes them."""
        self._check_fitted()
        self._decomposed, self._eigenvalues = self.H_facs.decompose(self.damping, known), None

    def _check_prior_structure(self, value: Tensor) -> None:
        if len(value) not in (1, self.n_layers):
            raise ValueError(
                f"Kron takes a scalar or layerwise prior precision (1 or {self.n_layers} values), not a diagonal one of "
                f"{len(value)}: a diagonal does not commute with the Kronecker factors. Use hessian_structure='diag' or 'full'."
            )

    @property
    def posterior_precision(self) -> KronDecomposed:
        """Posterior precision as a decomposed Kronecker product."""
        return self._precision(self.prior_precision)

    def _precision(self, prior_precision: Tensor) -> KronDecomposed:
        self._check_fitted()
        return self.H * self._H_factor + (prior_precision if len(prior_precision) > 1 else prior_precision[0])

    @property
    def _spectrum(self) -> KronSpectrum:
        """Eigenvalues of the posterior precision. Eigenvectors cost several times as much, and the evidence needs none."""
        self._check_fitted()
        if self._eigenvalues is None:
            known = self._decomposed
            self._eigenvalues = self.H_facs.eigenvalues(self.damping) if known is None else known
        prior_precision = self.prior_precision
        return self._eigenvalues * self._H_factor + (
            prior_precision if len(prior_precision) > 1 else prior_precision[0]
        )

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        return self._spectrum.logdet()

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, as one sum: the two may be large where this is small."""
        return self._spectrum.logdet_ratio()

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``."""
        delta = value - self.mean
        return (delta * self.posterior_precision.bmm(delta, exponent=1)).sum(-1)

    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top`, ``(batch, outputs, outputs)``."""
        return self.posterior_precision.inv_square_form(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly, ``(batch · outputs, batch · outputs)``."""
        return self.posterior_precision.bmm(Js, exponent=-1) @ Js.T

    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors ``(n_samples, parameters)``."""
        check_samples(n_samples)
        precision = self.posterior_precision
        noise = torch.randn(n_samples, self.n_params, device=self._device, dtype=self._dtype, generator=generator)
        return self.mean + precision.bmm(noise, exponent=-0.5)

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        blocks = self.sums_spec().blocks
        precisions = [self._precision(p) for p in prior_precisions]
        bases = [Basis(*vectors) for vectors in self.H.eigenvectors]
        weights = [lambda t, i=i: precisions[t].spectrum(i).reciprocal() for i in range(len(blocks))]
        return block_variance(capture, blocks, bases, weights, len(precisions), diagonal)
