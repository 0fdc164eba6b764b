r"""Dense posterior: :math:`P = H / (\sigma^2 T) + \mathrm{diag}(p_0)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace.curvature import contract
from laplace.curvature.sums import CurvatureSums
from laplace.curvature.variance import dense_variance
from laplace.posterior.parametric import ParametricLaplace
from laplace.utils.matrix import symeig


class FullLaplace(ParametricLaplace):
    """Laplace approximation with dense curvature.

    A scalar prior precision only shifts the spectrum of ``H``: evidence and sweeps over priors then use one
    eigendecomposition, made on first use. Other priors need a Cholesky factor of their own.

    Attributes:
        H: Summed curvature ``(parameters, parameters)``.
    """

    structure = "full"

    def __init__(self, *args: Any, **kwargs: Any):
        """See :class:`laplace.BaseLaplace`."""
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._scale: Tensor | None = None
        super().__init__(*args, **kwargs)

    def _finalize(self, sums: CurvatureSums) -> None:
        self.H = sums.tensors["full"]
        self._eigen = None

    def _prior_changed(self) -> None:
        self._scale = None

    @property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors and eigenvalues of ``H``."""
        self._check_fitted()
        if self._eigen is None:
            self._eigen = symeig(self.H)
        return self._eigen

    @property
    def posterior_precision(self) -> Tensor:
        """Posterior precision ``(parameters, parameters)``."""
        self._check_fitted()
        return self._H_factor * self.H + torch.diag(self.prior_precision_diag)

    @property
    def posterior_scale(self) -> Tensor:
        r"""Lower triangular root :math:`L` of the covariance, :math:`LL^\top = P^{-1}`."""
        if self._scale is None or self._scale.requires_grad:
            self._scale = invsqrt_precision(self.posterior_precision)
        return self._scale

    @property
    def posterior_covariance(self) -> Tensor:
        """Posterior covariance ``(parameters, parameters)``."""
        scale = self.posterior_scale
        return scale @ scale.T

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        if len(self.prior_precision) == 1:
            return (self._H_factor * self._spectrum[1] + self.prior_precision).log().sum()
        return 2 * torch.linalg.cholesky(self.posterior_precision).diagonal().log().sum()

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``."""
        delta = value - self.mean
        return ((delta @ self.posterior_precision) * delta).sum(-1)

    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top`, ``(batch, outputs, outputs)``."""
        half = Js @ self.posterior_scale
        return half @ half.transpose(-1, -2)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly, ``(batch · outputs, batch · outputs)``."""
        half = Js @ self.posterior_scale
        return half @ half.T

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors ``(n_samples, parameters)``."""
        scale = self.posterior_scale
        noise = torch.randn(n_samples, self.n_params, device=self._device, dtype=self._dtype, generator=generator)
        return self.mean + noise @ scale.T

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        blocks = self.sums_spec().blocks
        rows = contract.jacobians(capture, blocks)
        if len(prior_precisions) == 1 and self._scale_is_cheaper(prior_precisions[0]):
            ones = torch.ones(self.n_params, dtype=rows.dtype, device=rows.device)
            return dense_variance(rows, self.posterior_scale, [lambda t: ones], 1, diagonal)
        if any(len(p) > 1 for p in prior_precisions):
            raise ValueError("A sweep over prior precisions of a full posterior takes scalars only.")
        vectors, values = self._spectrum
        values = values * self._H_factor
        weights = [lambda t: (values + prior_precisions[t]).reciprocal()]
        return dense_variance(rows, vectors, weights, len(prior_precisions), diagonal)

    def _scale_is_cheaper(self, prior_precision: Tensor) -> bool:
        return prior_precision is self.prior_precision and (self._eigen is None or len(prior_precision) > 1)


def invsqrt_precision(M: Tensor) -> Tensor:
    r"""Lower triangular :math:`L` with :math:`LL^\top = M^{-1}`, from the Cholesky factor of the reversed matrix.

    Raises:
        ValueError: If ``M`` is not positive definite.
    """
    reversed_factor, info = torch.linalg.cholesky_ex(M.flip(-1, -2))
    if int(info) != 0:
        raise ValueError(
            "The posterior precision is not positive definite in this floating-point type; raise the prior precision or "
            "convert the model to float64."
        )
    inverse = reversed_factor.flip(-1, -2).transpose(-1, -2)
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return torch.linalg.solve_triangular(inverse, identity, upper=False)
