r"""Diagonal posterior: :math:`P = \mathrm{diag}(h / (\sigma^2 T) + p_0)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace.capture.blocks import Basis, Block
from laplace.capture.variance import block_variance
from laplace.linalg.precision import in_full_precision, widened
from laplace.noise import check_samples
from laplace.posterior.parametric import ParametricLaplace
from laplace.posterior.weights import check_type
from laplace.prior import spread
from laplace.structures.diag import diag_vector
from laplace.structures.sums import CurvatureSums


class DiagLaplace(ParametricLaplace):
    """Laplace approximation with diagonal curvature.

    Example:
        >>> import torch
        >>> from laplace import DiagLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = DiagLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    structure = "diag"
    _diagonal: Tensor | None = None

    def _finalize(self, sums: CurvatureSums) -> None:
        self._diagonal = diag_vector(sums)

    @property
    def H(self) -> Tensor | None:
        """Diagonal of the summed curvature ``(parameters,)``; zero before ``fit``."""
        if self._diagonal is None and self.params:
            return torch.zeros(self._n_inferred, dtype=self._dtype, device=self._device)
        return self._diagonal

    def _in_order_of_sums(self, values: Tensor) -> Tensor:
        """Subnetworks bring values from their own order to that of the sums here."""
        return values

    @property
    def posterior_precision(self) -> Tensor:
        """Diagonal of the posterior precision ``(parameters,)``."""
        self._check_fitted()
        return self._H_factor * self.H + self.prior_precision_diag

    @property
    def posterior_scale(self) -> Tensor:
        """Posterior standard deviations ``(parameters,)``."""
        return self.posterior_precision.rsqrt()

    @property
    def posterior_variance(self) -> Tensor:
        """Posterior variances ``(parameters,)``."""
        return self.posterior_precision.reciprocal()

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        return self.posterior_precision.double().log().sum()

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, as one sum: the two may be large where this is small."""
        prior = self.prior_precision_diag.double()
        return (self.posterior_precision.double() / prior).log().sum()

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``."""
        delta = value - self._mean_inferred
        return (delta.square() * self.posterior_precision).sum(-1)

    @in_full_precision()
    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top`, ``(batch, outputs, outputs)``."""
        Js = widened(Js)
        return (Js * self.posterior_variance) @ Js.transpose(-1, -2)

    @in_full_precision()
    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly, ``(batch · outputs, batch · outputs)``."""
        Js = widened(Js)
        return (Js * self.posterior_variance) @ Js.T

    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors ``(n_samples, parameters)``."""
        check_samples(n_samples)
        check_type(self)
        self._check_fitted()
        scale = self.posterior_scale
        noise = torch.randn(n_samples, len(scale), device=self._device, dtype=self._dtype, generator=generator)
        return self._mean_inferred + noise * scale

    def _largest_curvature(self) -> float:
        return float((self._H_factor * self.H.max()).item())

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        blocks = self.sums_spec().blocks
        sizes = [block.size for block in blocks]
        curvature = self._in_order_of_sums(self._H_factor * self.H).split(sizes)
        priors = [self._in_order_of_sums(spread(value, sizes)).split(sizes) for value in prior_precisions]

        def weight(index: int):
            return lambda t: _whole(blocks[index], (curvature[index] + priors[t][index]).reciprocal_())

        weights = [weight(i) for i in range(len(blocks))]
        return block_variance(capture, blocks, [Basis()] * len(blocks), weights, len(prior_precisions), diagonal)


def _whole(block: Block, variances: Tensor) -> Tensor:
    """Variances of a whole tensor, ``(out, in)`` or ``(out,)``; entries outside a subnetwork have none."""
    if block.chosen is not None:
        whole = torch.zeros(torch.Size(block.shape).numel(), dtype=variances.dtype, device=variances.device)
        variances = whole.index_put((block.indices.to(whole.device),), variances)
    return variances if len(block.shape) < 2 else variances.view(block.shape[0], -1)
