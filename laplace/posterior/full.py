r"""Dense posterior: :math:`P = H / (\sigma^2 T) + \mathrm{diag}(p_0)`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.capture import contractions
from laplace.capture.variance import dense_variance
from laplace.linalg import memory
from laplace.linalg.dense import invsqrt_precision, not_positive_definite
from laplace.linalg.eigen import eigenvalues, eigh_double, shifted
from laplace.linalg.precision import widened
from laplace.noise import check_samples
from laplace.posterior.arguments import by_name
from laplace.posterior.parametric import ParametricLaplace
from laplace.posterior.weights import check_type
from laplace.structures.sums import CurvatureSums


class FullLaplace(ParametricLaplace):
    """Laplace approximation with dense curvature.

    A scalar prior precision only shifts the spectrum of ``H``: evidence and sweeps over priors then use one
    eigendecomposition, made on first use. Other priors need a Cholesky factor of their own.

    All algebra is done in float64, whatever the model's type: rounded to float32, curvature of 1e8 beside a prior precision of
    1e-4 would show as many directions that the data does not determine. Results are rounded last.

    Example:
        >>> import torch
        >>> from laplace import FullLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = FullLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    structure = "full"

    @by_name
    def __init__(self, **kwargs: Any):
        """See :class:`laplace.BaseLaplace`."""
        self._eigenvalues: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._scale: Tensor | None = None
        super().__init__(**kwargs)

    def _finalize(self, sums: CurvatureSums) -> None:
        self._eigenvalues = self._eigen = None

    @property
    def H(self) -> Tensor | None:
        """Summed curvature ``(parameters, parameters)``, rounded to the posterior's type; zero before ``fit``."""
        if self.sums is not None:
            return self._curvature.to(self.sums.spec.torch_dtype)
        n = self._n_inferred if self.params else None
        return None if n is None else torch.zeros(n, n, dtype=self._dtype, device=self._device)

    @property
    def _curvature(self) -> Tensor:
        """The same in float64, as it was summed."""
        return self.sums.tensors["full"]

    def _in_own_order(self, values: Tensor) -> Tensor:
        """Subnetworks bring the last dimension from the order of the sums to their own here."""
        return values

    def _prior_changed(self) -> None:
        self._scale = None

    def use_decompositions(self, known: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over the eigenvalues and eigenvectors of the sum, as :mod:`laplace.structures.decomposition` makes them."""
        self._check_fitted()
        self._eigen, self._eigenvalues = known["full"], None

    @property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``H`` in float64."""
        self._check_fitted()
        if self._eigen is None:
            self._require(4, "The eigendecomposition")
            self._eigen = eigh_double(self._curvature, "summed curvature")
        return self._eigen

    @property
    def _values(self) -> Tensor:
        """Eigenvalues of ``H`` in float64, for the evidence: without eigenvectors while nobody has asked for them."""
        self._check_fitted()
        if self._eigenvalues is None:
            self._require(4, "The eigenvalues")
            known = self._eigen
            self._eigenvalues = eigenvalues(self._curvature, "summed curvature") if known is None else known[0]
        return self._eigenvalues

    def _shifted(self, values: Tensor, prior_precision: Tensor) -> Tensor:
        """Eigenvalues of the posterior precision for a scalar prior precision, in float64, from those of ``H``."""
        self._warn_of_rounding(prior_precision)
        rounding = len(values) * torch.finfo(self.params[0].dtype).eps * values.abs().max()
        if isinstance(self.backend, (GGNInterface, EFInterface)):
            rounding = math.inf
        rounded = values > -rounding  # may be zero but for rounding
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
        self._warn_of_rounding(self.prior_precision)
        return self._H_factor.double() * self._curvature + torch.diag(self.prior_precision_diag.double())

    def _warn_of_rounding(self, prior_precision: Tensor) -> None:
        """Say so where a backend has rounded the curvature by more than the prior precision adds to it."""
        if self.backend.exact_products or self.params[0].dtype is torch.float64:
            return
        eps = torch.finfo(self.sums.spec.torch_dtype).eps
        error = float(eps * self._H_factor.detach().double() * self._curvature.diagonal().max())
        weakest = float(prior_precision.detach().min())
        if error > weakest:
            warnings.warn(
                f"{type(self.backend).__name__} adds up curvature in {self.sums.spec.dtype}, with rounding of about "
                f"{error:.1e}, more than the prior precision {weakest:.1e}: log determinants and variances may be far off. "
                "Use the native backend, or model.double().",
                stacklevel=3,
            )

    @property
    def posterior_scale(self) -> Tensor:
        r"""Lower triangular root :math:`L` of the covariance, :math:`LL^\top = P^{-1}`."""
        return self._double_scale().to(self.sums.spec.torch_dtype)

    def _double_scale(self) -> Tensor:
        """The same in float64."""
        if self._scale is None or self._scale.requires_grad:
            self._scale = invsqrt_precision(self._double_precision())
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
        scale = self._double_scale()
        return (scale @ scale.T).to(self.sums.spec.torch_dtype)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        return self.log_det_ratio + self.log_det_prior_precision

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, as one sum in float64: the two may be large where this is small.

        Raises:
            ValueError: If the precision is not positive definite.
        """
        if len(self.prior_precision) == 1:
            terms = (self._shifted(self._values, self.prior_precision) / self.prior_precision.double()).log()
        else:
            factor, info = torch.linalg.cholesky_ex(self._double_precision())
            if int(info) != 0:
                raise not_positive_definite()
            terms = 2 * factor.diagonal().log() - self.prior_precision_diag.double().log()
        return terms.sum()

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``."""
        delta = value.double() - self._mean_inferred.double()
        return ((delta @ self._double_precision()) * delta).sum(-1)

    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top`, ``(batch, outputs, outputs)``."""
        Js = widened(Js)
        half = Js.double() @ self._double_scale()
        return (half @ half.mT).to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly, ``(batch · outputs, batch · outputs)``."""
        return self.functional_variance(Js)

    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors ``(n_samples, parameters)``."""
        check_samples(n_samples)
        check_type(self)
        scale = self._double_scale()
        noise = torch.randn(n_samples, len(scale), device=self._device, dtype=self._dtype, generator=generator)
        return self._mean_inferred + (noise.double() @ scale.T).to(self._dtype)

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        blocks = self.sums_spec().blocks
        if len(prior_precisions) == 1 and self._scale_is_cheaper(prior_precisions[0]):
            basis = self._double_scale()
            weights = [torch.ones(len(basis), dtype=basis.dtype, device=basis.device)]
        elif any(len(p) > 1 for p in prior_precisions):
            raise ValueError("A sweep over prior precisions of a full posterior takes scalars only.")
        else:
            values, basis = self._spectrum
            weights = [self._shifted(values, p).reciprocal() for p in prior_precisions]
        parts = contractions.jacobian_chunks(capture, blocks)
        found = [
            dense_variance(self._in_own_order(rows.double()), basis, weights, diagonal).to(rows.dtype) for rows in parts
        ]
        return torch.cat(found, 1)

    def _scale_is_cheaper(self, prior_precision: Tensor) -> bool:
        return prior_precision is self.prior_precision and (self._eigen is None or len(prior_precision) > 1)
