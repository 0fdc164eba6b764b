r"""Dense posterior: :math:`P = H / (\sigma^2 T) + \mathrm{diag}(p_0)`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.capture import contractions
from laplace.capture.variance import dense_variance
from laplace.linalg import memory
from laplace.linalg.dense import invsqrt_precision, not_positive_definite
from laplace.linalg.eigen import eigh, shifted
from laplace.posterior.arguments import by_name
from laplace.posterior.parametric import ParametricLaplace
from laplace.structures.sums import CurvatureSums


class FullLaplace(ParametricLaplace):
    """Laplace approximation with dense curvature.

    A scalar prior precision only shifts the spectrum of ``H``: evidence and sweeps over priors then use one
    eigendecomposition, made on first use. Other priors need a Cholesky factor of their own.
    """

    structure = "full"

    @by_name
    def __init__(self, **kwargs: Any):
        """See :class:`laplace.BaseLaplace`."""
        self._eigen: tuple[Tensor, Tensor, Tensor] | None = None
        self._scale: Tensor | None = None
        super().__init__(**kwargs)

    def _finalize(self, sums: CurvatureSums) -> None:
        self._eigen = None

    @property
    def H(self) -> Tensor | None:
        """Summed curvature ``(parameters, parameters)``, rounded to the posterior's type; None before ``fit``."""
        return None if self.sums is None else self._curvature.to(self.sums.spec.torch_dtype)

    @property
    def _curvature(self) -> Tensor:
        """The same in float64, as it was summed."""
        return self.sums.tensors["full"]

    def _prior_changed(self) -> None:
        self._scale = None

    @property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of ``H`` in float64, which of them may be zero but for rounding, and eigenvectors."""
        self._check_fitted()
        if self._eigen is None:
            self._require(4, "The eigendecomposition")
            values, vectors = eigh(self._curvature)
            rounding = len(values) * torch.finfo(self.params[0].dtype).eps * values.abs().max()
            if isinstance(self.backend, (GGNInterface, EFInterface)):
                rounding = math.inf
            self._eigen = values, values > -rounding, vectors.to(self.sums.spec.torch_dtype)
        return self._eigen

    def _shifted(self, prior_precision: Tensor) -> Tensor:
        """Eigenvalues of the posterior precision for a scalar prior precision, in float64."""
        values, rounded, _ = self._spectrum
        values, prior = self._H_factor.double() * values, prior_precision.double()
        values = torch.where(rounded, shifted(values, prior), values + prior)
        if not bool((values > 0).all()):
            raise not_positive_definite()
        return values

    @property
    def posterior_precision(self) -> Tensor:
        """Posterior precision ``(parameters, parameters)``."""
        return self._double_precision().to(self.sums.spec.torch_dtype)

    def _double_precision(self) -> Tensor:
        """Posterior precision in float64: next to large curvature, float32 has no digits left for the prior."""
        self._check_fitted()
        self._require(4, "Computing with the float64 form")
        return self._H_factor.double() * self._curvature + torch.diag(self.prior_precision_diag.double())

    @property
    def posterior_scale(self) -> Tensor:
        r"""Lower triangular root :math:`L` of the covariance, :math:`LL^\top = P^{-1}`."""
        if self._scale is None or self._scale.requires_grad:
            self._scale = invsqrt_precision(self._double_precision()).to(self.sums.spec.torch_dtype)
        return self._scale

    def _require(self, copies: int, what: str) -> None:
        """Stop before a factorisation that cannot fit into memory."""
        size = len(self._curvature)
        memory.require(
            copies * memory.tensor_bytes(size, size),
            self._curvature.device,
            f"{what} of a dense posterior precision over {size:,} parameters",
            "Use hessian_structure='kron' or 'diag', subset_of_weights='last_layer', or a smaller subnetwork.",
        )

    @property
    def posterior_covariance(self) -> Tensor:
        """Posterior covariance ``(parameters, parameters)``."""
        scale = self.posterior_scale
        return scale @ scale.T

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        return (self.log_det_ratio + self.log_det_prior_precision).to(self._dtype)

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, as one sum in float64: the two may be large where this is small."""
        if len(self.prior_precision) == 1:
            terms = (self._shifted(self.prior_precision) / self.prior_precision.double()).log()
        else:
            factor, info = torch.linalg.cholesky_ex(self._double_precision())
            if int(info) != 0:
                raise not_positive_definite()
            terms = 2 * factor.diagonal().log() - self.prior_precision_diag.double().log()
        return terms.sum().to(self._dtype)

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``."""
        delta = value - self._mean_inferred
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
        noise = torch.randn(n_samples, len(scale), device=self._device, dtype=self._dtype, generator=generator)
        return self._mean_inferred + noise @ scale.T

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        blocks = self.sums_spec().blocks
        if len(prior_precisions) == 1 and self._scale_is_cheaper(prior_precisions[0]):
            basis = self.posterior_scale
            weights = [torch.ones(len(basis), dtype=basis.dtype, device=basis.device)]
        elif any(len(p) > 1 for p in prior_precisions):
            raise ValueError("A sweep over prior precisions of a full posterior takes scalars only.")
        else:
            basis, weights = self._spectrum[2], [self._shifted(p).reciprocal() for p in prior_precisions]
        parts = contractions.jacobian_chunks(capture, blocks)
        return torch.cat([dense_variance(rows, basis, weights, diagonal) for rows in parts], 1)

    def _scale_is_cheaper(self, prior_precision: Tensor) -> bool:
        return prior_precision is self.prior_precision and (self._eigen is None or len(prior_precision) > 1)
