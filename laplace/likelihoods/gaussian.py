r"""Regression: :math:`\tfrac12 \lVert f - y\rVert^2`, a Gaussian of unit noise whose real noise enters later as a factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log, pi, sqrt

import torch
from torch import Tensor, nn

from laplace.enums import Likelihood, LinkApprox
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.checks import check_finite, missing_dimension
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.scores import gaussian_entropy, regression_details, regression_scores, summarize_regression
from laplace.linalg.precision import double

_LOG_SQRT_2PI = log(sqrt(2 * pi))


class Gaussian(BaseLikelihood):
    """Regression with one observation noise for all outputs; a prediction is a mean and a variance or covariance.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import Gaussian
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> la = Laplace(torch.nn.Linear(2, 1), Gaussian(), "all", "full")
        >>> la.fit([(x, y)])
        >>> mean, variance = la(x)
        >>> variance.shape
        torch.Size([8, 1, 1])
    """

    word = Likelihood.REGRESSION
    has_noise = True
    predicts_outputs = True
    grid_needs_variance = False  # the mean of the linearised network does not depend on the prior

    def are_right(self, f: Tensor, y: Tensor) -> bool:
        """See :meth:`BaseLikelihood.are_right`."""
        return y.shape == f.shape and bool(torch.isfinite(f.sum() + y.sum()))

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that are not one finite value per output."""
        if y.shape != f.shape:
            raise ValueError(
                f"Targets of shape {tuple(y.shape)} do not match outputs of shape {tuple(f.shape)}; "
                "regression needs one target per output, so (batch, outputs)" + missing_dimension(f, y)
            )
        check_finite("The regression target", y, offset)

    def check_length(self, y: Tensor, n_outputs: int) -> None:
        """Refuse sequences of another length: the noise's constant counts their values."""
        if y.ndim > 2 and y[0].numel() != n_outputs:
            raise ValueError(
                f"Targets of shape {tuple(y.shape)} have {y[0].numel()} values per example, those of the first batch had "
                f"{n_outputs}. Give sequences of one length."
            )

    def count_outputs(self, f: Tensor) -> int:
        """All values of an example."""
        return f[0].numel()

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Half squared error of every position."""
        return 0.5 * (f - y.to(f.dtype)).square().sum(-1)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Half the sum of squared errors, float64."""
        f = double(f)
        return 0.5 * (f - y.to(f.device).double()).square().sum()

    def noise_constant(self, n_data: int, n_outputs: int, sigma_noise: Tensor) -> Tensor:
        r"""Normalisation :math:`-N C \log(\sigma \sqrt{2\pi})` of the Gaussians."""
        return -n_data * n_outputs * (sigma_noise.log() + _LOG_SQRT_2PI)

    def torch_loss(self) -> tuple[nn.Module, float]:
        """The squared error, which has no half."""
        return nn.MSELoss(reduction="sum"), 0.5

    def training_loss(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Mean squared error over examples and outputs."""
        return nn.functional.mse_loss(f, y), 0.5

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual."""
        return f - y.to(f.dtype)

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The unit vectors."""
        for j in range(f.shape[-1]):
            column = torch.zeros_like(f)
            column[..., j] = 1
            yield column

    def hessian_diagonal(self, f: Tensor, y: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(f)

    def hessian_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """As many identities as there are examples."""
        return len(f) * torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """Outputs with unit noise."""
        return f + torch.special.ndtri(u).to(f.dtype)

    def sampled_gradients(self, f: Tensor, y: Tensor, num_samples: int, seed: int, offset: int) -> Iterator[Tensor]:
        """The noise itself, without the rounding of adding and subtracting the outputs."""
        for u in self._uniform(f, y, num_samples, seed, offset):
            yield torch.special.ndtri(u).to(f.dtype) * num_samples**-0.5

    def at(self, f: Tensor) -> Prediction:
        """Outputs without variance."""
        return f, torch.zeros_like(f)

    def of_networks(self, outputs: Tensor) -> Prediction:
        """Mean and variance over networks."""
        return outputs.mean(0), outputs.var(0)

    def integrate(
        self,
        f: Tensor,
        variance: Tensor,
        link_approx: LinkApprox,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """The Gaussian itself, without observation noise."""
        return f, variance

    def public(self, prediction: Prediction) -> tuple[Tensor, ...]:
        """Mean and variances or covariances."""
        return prediction

    def check_scored(self, prediction: Prediction, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that do not fit the mean."""
        self.check_shapes(prediction[0], y, offset)

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :func:`laplace.likelihoods.scores.regression_scores`."""
        mean, variance = prediction
        return regression_scores(mean, variance + sigma_noise**2, y)

    def details(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :func:`laplace.likelihoods.scores.regression_details`."""
        mean, variance = prediction
        return regression_details(mean, variance + sigma_noise**2, y)

    def monitored(self, prediction: Prediction, y: Tensor | None = None, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """The differential entropy of every example's Gaussian, averaged over outputs."""
        return {"entropy": gaussian_entropy(prediction[0], prediction[1], sigma_noise)}

    def summarize(
        self, scores: Mapping[str, Tensor], ood_confidence: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """See :func:`laplace.likelihoods.scores.summarize_regression`."""
        return summarize_regression(scores)

    def free_noise_terms(self, prediction: Prediction, y: Tensor) -> dict[str, Tensor]:
        r"""For every output, what its loss consists of while the noise is open and the predictive variance in units of it.

        Under :math:`\mathcal N(f, \sigma^2 (1 + v))` that is ``spread``, :math:`\log(1 + v)`, and ``error``,
        :math:`(y - f)^2 / (1 + v)`, each ``(batch, outputs)`` float64.
        """
        mean, variance = (t.detach().double().reshape(len(y), -1) for t in prediction)
        return {"spread": variance.log1p(), "error": (y.double().reshape(mean.shape) - mean).square() / (1 + variance)}

    def tuning_loss(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> float:
        """Summed negative log likelihood of a Gaussian whose variance is the predictive one plus the observation noise's."""
        mean, variance = (t.double().reshape(y.shape) for t in prediction)
        variance = variance + sigma_noise**2
        return float(((y.double() - mean).square() / variance + (2 * pi * variance).log()).sum() / 2)
