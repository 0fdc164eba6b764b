r"""Posteriors whose precision is known in the eigenbasis of Kronecker factors, parameter by parameter.

:math:`P = \bigoplus_l Q_l \left(\mathrm{diag}(s_l) / (\sigma^2 T) + \delta_l I\right) Q_l^\top`, where
:math:`Q_l = Q_B \otimes Q_A`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace.capture.blocks import Basis
from laplace.capture.weights import Weight
from laplace.linalg.decomposed import KronDecomposed, KronSpectrum
from laplace.linalg.kronecker import Kron
from laplace.linalg.precision import widened
from laplace.noise import check_samples
from laplace.posterior.by_block import ByBlockLaplace
from laplace.posterior.weights import check_type


class DecomposedLaplace(ByBlockLaplace):
    """Algebra of a posterior whose ``H`` is a :class:`laplace.utils.matrix.KronDecomposed`; subclasses say how it is found."""

    title: str  # of the structure, in errors

    @property
    def H(self) -> KronDecomposed | None:
        """Eigendecomposition of the summed curvature; zero before ``fit``."""
        if not self.params:
            return None
        parameters = [p if p.ndim else p[None] for p in self.params]
        return Kron.init_from_model(parameters, self._device, self._dtype).decompose()

    def _check_prior_structure(self, value: Tensor) -> None:
        if len(value) not in (1, self.n_layers):
            raise ValueError(
                f"{self.title} takes a scalar or layerwise prior precision (1 or {self.n_layers} values), not a diagonal one "
                f"of {len(value)}: a diagonal does not commute with the Kronecker factors. Use hessian_structure='diag' or "
                "'full'."
            )

    @property
    def posterior_precision(self) -> KronDecomposed:
        """Posterior precision as a decomposed Kronecker product."""
        return self._precision(self.prior_precision)

    def _precision(self, prior_precision: Tensor) -> KronDecomposed:
        self._check_fitted()
        return self._shifted(self.H, prior_precision)

    def _shifted(self, curvature: KronSpectrum, prior_precision: Tensor) -> Any:
        """Curvature, scaled by noise and temperature, plus a prior."""
        return curvature * self._H_factor + (prior_precision if len(prior_precision) > 1 else prior_precision[0])

    @property
    def _spectrum(self) -> KronSpectrum:
        """Eigenvalues of the posterior precision."""
        return self.posterior_precision

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
        Js = widened(Js)
        return self.posterior_precision.inv_square_form(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly, ``(batch · outputs, batch · outputs)``."""
        Js = widened(Js)
        return self.posterior_precision.bmm(Js, exponent=-1) @ Js.T

    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors ``(n_samples, parameters)``."""
        check_samples(n_samples)
        check_type(self)
        precision = self.posterior_precision
        noise = torch.randn(n_samples, self.n_params, device=self._device, dtype=self._dtype, generator=generator)
        return self.mean + precision.bmm(noise, exponent=-0.5)

    def _largest_curvatures(self) -> list[float]:
        if self.H.damping:  # roots of prior precisions are added, as if curvatures had any size
            return [math.inf] * len(self.H)
        factor = float(self._H_factor)
        return [factor * math.prod(float(values.max()) for values in block) for block in self.H.eigenvalues]

    def _bases(self) -> list[Basis]:
        return [Basis(*vectors) for vectors in self.H.eigenvectors]

    def _by_block(self, prior_precision: Tensor) -> Sequence[Tensor]:
        return prior_precision.expand(len(self.sums_spec().blocks))[:, None].unbind()

    def _variances(self, priors: Sequence[Sequence[Tensor]]) -> list[Weight]:
        self._check_fitted()
        curvature = self.H * self._H_factor
        return [_variances(curvature, i, torch.cat(list(of_block))) for i, of_block in enumerate(priors)]


def _variances(curvature: KronDecomposed, block: int, priors: Tensor) -> Weight:
    """Reciprocals of one block's eigenvalues plus prior precisions."""
    deltas = curvature.deltas[block] + priors.to(curvature.deltas)
    return lambda of, rows, columns: curvature.part(block, deltas[of], rows, columns).reciprocal()
