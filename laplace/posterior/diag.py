r"""Diagonal posterior: :math:`P = \mathrm{diag}(h / (\sigma^2 T) + p_0)`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace.capture.blocks import Basis, Block
from laplace.capture.weights import Part, Weight, as_matrix
from laplace.linalg.precision import in_full_precision, widened
from laplace.noise import check_samples
from laplace.posterior.by_block import ByBlockLaplace
from laplace.posterior.weights import check_type
from laplace.prior import spread
from laplace.structures.diag import diag_vector
from laplace.structures.sums import CurvatureSums


class DiagLaplace(ByBlockLaplace):
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

    def _largest_curvatures(self) -> list[float]:
        factor = float(self._H_factor)
        return [factor * float(h.max()) for h in self._curvatures()]

    def _curvatures(self) -> Sequence[Tensor]:
        """Diagonal of the summed curvature by block."""
        return self._in_order_of_sums(self.H).split([block.size for block in self.sums_spec().blocks])

    def _bases(self) -> list[Basis]:
        return [Basis()] * len(self.sums_spec().blocks)

    def _by_block(self, prior_precision: Tensor) -> Sequence[Tensor]:
        sizes = [block.size for block in self.sums_spec().blocks]
        if len(prior_precision) == 1:
            return [prior_precision] * len(sizes)
        return self._in_order_of_sums(spread(prior_precision, sizes)).split(sizes)

    def _variances(self, priors: Sequence[Sequence[Tensor]]) -> list[Weight]:
        factor, blocks = float(self._H_factor), self.sums_spec().blocks
        return [
            _variances(_whole(block, h, math.inf), [_whole(block, p, 1.0) for p in of_block], factor)
            for block, h, of_block in zip(blocks, self._curvatures(), priors, strict=True)
        ]


def _variances(curvature: Tensor, priors: Sequence[Tensor], factor: float) -> Weight:
    """The reciprocals of curvature ``(out, in)`` times a factor, plus prior precisions, each a number or ``(out, in)``."""
    numbers = all(prior.numel() == 1 for prior in priors)
    stacked = torch.stack([prior.reshape(1, 1) if numbers else prior.expand_as(curvature) for prior in priors])

    def weight(of: slice, rows: Part, columns: Part) -> Tensor:
        prior = stacked[of] if numbers else stacked[of][:, rows][:, :, columns]
        return torch.add(prior, curvature[rows][:, columns], alpha=factor).reciprocal_()

    return weight


def _whole(block: Block, values: Tensor, outside: float) -> Tensor:
    """Values of a whole tensor ``(out, in)``, one column if it is no matrix; a number stays one.

    Args:
        block: The tensor.
        values: Of all its entries, or of a subnetwork's.
        outside: Of the entries outside of the subnetwork.
    """
    if values.numel() == 1 and block.size > 1:
        return values
    if block.chosen is not None:
        whole = values.new_full((torch.Size(block.shape).numel(),), outside)
        values = whole.index_put((block.indices.to(whole.device),), values)
    return as_matrix(values if len(block.shape) < 2 else values.view(block.shape[0], -1))
