r"""Regression with predicted noise: :math:`\tfrac12 [(y - \mu)^2 e^{-s} + s + \log 2\pi]` of mean and log variance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log, pi

import torch
from torch import Tensor

from laplace.enums import LinkApprox
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.checks import check_finite, missing_dimension
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.roots import diagonal_columns
from laplace.likelihoods.scores import gaussian_entropy, regression_details, regression_scores, summarize_regression

_LOG_2PI = log(2 * pi)


class HeteroscedasticGaussian(BaseLikelihood):
    r"""Outputs are the means and then the log variances of the targets, ``(batch, …, 2 · targets)``.

    The Hessian in the outputs depends on the targets and may be indefinite; the Gauss-Newton matrix has the Fisher information
    :math:`\mathrm{diag}(e^{-s}, \tfrac12)` in its place (Immer et al., "Effective Bayesian heteroscedastic regression with deep
    neural networks", NeurIPS 2023). A prediction is mean and variance of the target: with a Gaussian over :math:`(\mu, s)`,
    :math:`\mathrm E[\mu]` and :math:`\mathrm{Var}[\mu] + \mathrm E[e^s] = v_\mu + e^{s + v_s / 2}`.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import HeteroscedasticGaussian
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> la = Laplace(torch.nn.Linear(2, 2), HeteroscedasticGaussian(), "all", "full")
        >>> la.fit([(x, y)])
        >>> la.log_marginal_likelihood().dtype
        torch.float64
    """

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that are not one value per pair of outputs."""
        wanted = (*f.shape[:-1], f.shape[-1] // 2)
        if f.shape[-1] % 2:
            raise ValueError(
                f"Outputs of shape {tuple(f.shape)} are not pairs: this likelihood takes the means of all targets and then "
                "their log variances, (batch, 2 · targets)."
            )
        if tuple(y.shape) != wanted:
            raise ValueError(
                f"Targets of shape {tuple(y.shape)} do not match outputs of shape {tuple(f.shape)}, the means and then the "
                f"log variances; expected {wanted}" + missing_dimension(f[..., : wanted[-1]], y)
            )
        check_finite("The regression target", y, offset)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Negative log density, summed over the targets of a position."""
        mean, s = f.chunk(2, -1)
        return 0.5 * ((y.to(f.dtype) - mean).square() * (-s).exp() + s + _LOG_2PI).sum(-1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Of mean and log variance."""
        mean, s = f.chunk(2, -1)
        residual, precision = mean - y.to(f.dtype), (-s).exp()
        return torch.cat([residual * precision, 0.5 * (1 - residual.square() * precision)], -1)

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Of the Fisher information, which is diagonal."""
        s = f.chunk(2, -1)[1]
        return diagonal_columns(torch.cat([(-0.5 * s).exp(), torch.full_like(s, 0.5**0.5)], -1))

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """Mean plus noise."""
        mean, s = f.chunk(2, -1)
        return mean + torch.special.ndtri(u.chunk(2, -1)[0]).to(f.dtype) * (0.5 * s).exp()

    def mean(self, f: Tensor) -> Tensor:
        """The means."""
        return f.chunk(2, -1)[0]

    def at(self, f: Tensor) -> Prediction:
        """Mean and variance of one network."""
        mean, s = f.chunk(2, -1)
        return mean, s.exp()

    def of_networks(self, outputs: Tensor) -> Prediction:
        """Mean and variance of the mixture of several networks' Gaussians."""
        mean, s = outputs.chunk(2, -1)
        return mean.mean(0), mean.var(0, correction=0) + s.exp().mean(0)

    def diagonal_suffices(self, link_approx: LinkApprox) -> bool:
        """Covariances between mean and log variance do not enter the two moments."""
        return True

    def closed_form(self, f: Tensor, variance: Tensor, link_approx: LinkApprox) -> Prediction:
        """Mean and variance of the target, exactly, whatever the link."""
        (mean, s), (of_mean, of_s) = f.chunk(2, -1), variance.chunk(2, -1)
        return mean, of_mean + (s + of_s / 2).exp()

    def public(self, prediction: Prediction) -> tuple[Tensor, ...]:
        """Mean and variance of the target, ``(batch, targets)`` each, the noise included."""
        return prediction

    def check_scored(self, prediction: Prediction, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that do not fit the means."""
        self.check_shapes(torch.cat(prediction, -1), y, offset)

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :func:`laplace.likelihoods.scores.regression_scores`."""
        return regression_scores(*prediction, y)

    def details(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :func:`laplace.likelihoods.scores.regression_details`."""
        return regression_details(*prediction, y)

    def monitored(self, prediction: Prediction, y: Tensor | None = None, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """The differential entropy of every example's Gaussian, averaged over outputs."""
        return {"entropy": gaussian_entropy(*prediction)}

    def summarize(
        self, scores: Mapping[str, Tensor], ood_confidence: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """See :func:`laplace.likelihoods.scores.summarize_regression`."""
        return summarize_regression(scores)
