r"""Regression with a noise of its own for every output: :math:`\tfrac12 \sum_c (f_c - y_c)^2 / s_c^2`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from math import pi

import torch
from torch import Tensor

from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.gaussian import Gaussian
from laplace.likelihoods.links import variances_of
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.scores import gaussian_entropy, regression_details, regression_scores
from laplace.linalg.precision import double


class GaussianPerOutput(Gaussian):
    r"""Regression whose outputs have standard deviations :math:`\sigma s_c` of the observation noise.

    The ratios :math:`s_c` enter the curvature, a sum over the data, and so have to be known before ``fit``; the factor
    :math:`\sigma`, ``la.sigma_noise``, is common to all and is tuned as for one noise. This is the posterior of outputs and
    targets divided by :math:`s_c`, whatever the structure. ``laplace.utils.residual_noise`` learns the ratios from residuals.

    Args:
        noise: The values :math:`s_c`, one for every output, positive.

    Raises:
        ValueError: If a value is not positive and finite.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import GaussianPerOutput
        >>> x, y = torch.randn(8, 2), torch.randn(8, 2)
        >>> la = Laplace(torch.nn.Linear(2, 2), GaussianPerOutput([0.5, 2.0]), "all", "full")
        >>> la.fit([(x, y)])
        >>> mean, variance = la(x)
        >>> variance.shape
        torch.Size([8, 2, 2])
    """

    word = None

    def __init__(self, noise: Sequence[float] | Tensor):
        """See the class."""
        self.noise = tuple(float(value) for value in (noise.tolist() if isinstance(noise, Tensor) else noise))
        if not self.noise or not all(0 < value < math.inf for value in self.noise):
            raise ValueError(f"noise={list(self.noise)} must be one positive and finite number for every output.")

    @property
    def identity(self) -> str:
        """With the noise, since curvature depends on it."""
        return f"laplace.likelihoods:GaussianPerOutput(noise={list(self.noise)})"

    def _noise(self, like: Tensor) -> Tensor:
        return torch.tensor(self.noise, dtype=like.dtype, device=like.device)

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse outputs of another number than noises, and targets that are not one finite value per output."""
        if f.shape[-1] != len(self.noise):
            raise ValueError(f"The model has {f.shape[-1]} outputs, but there are {len(self.noise)} noises.")
        super().check_shapes(f, y, offset)

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Half squared error of every position, in units of the noise."""
        return 0.5 * ((f - y.to(f.dtype)) / self._noise(f)).square().sum(-1)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Half the sum of squared errors in units of the noise, float64."""
        f = double(f)
        return 0.5 * ((f - y.to(f.device).double()) / self._noise(f)).square().sum()

    def noise_constant(self, n_data: int, n_outputs: int, sigma_noise: Tensor) -> Tensor:
        r"""Normalisation :math:`-N \sum_c \log(\sigma s_c \sqrt{2\pi})` of the Gaussians."""
        mean_log = sum(math.log(value) for value in self.noise) / len(self.noise)
        return super().noise_constant(n_data, n_outputs, sigma_noise) - n_data * n_outputs * mean_log

    def torch_loss(self) -> tuple[None, float]:
        """None: other packages' factors leave out the noise."""
        return None, 1.0

    def training_loss(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Half the mean squared error over examples, in units of the noise."""
        return BaseLikelihood.training_loss(self, f, y)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual over the noise's variance."""
        return (f - y.to(f.dtype)) / self._noise(f).square()

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The unit vectors over the noise."""
        return (column / self._noise(f) for column in super().root_columns(f, y))

    def hessian_diagonal(self, f: Tensor, y: Tensor) -> Tensor:
        """Precisions of the noise."""
        return self._noise(f).square().reciprocal().expand_as(f)

    def hessian_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """As many of them as there are examples."""
        return len(f) * torch.diag(self._noise(f).square().reciprocal())

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """Outputs with noise."""
        return f + self._noise(f) * torch.special.ndtri(u).to(f.dtype)

    def sampled_gradients(self, f: Tensor, y: Tensor, num_samples: int, seed: int, offset: int) -> Iterator[Tensor]:
        """The noise itself, in units of its variance."""
        return (drawn / self._noise(f) for drawn in super().sampled_gradients(f, y, num_samples, seed, offset))

    def _with_noise(self, prediction: Prediction, sigma_noise: float) -> tuple[Tensor, Tensor]:
        """Mean and variances of the target."""
        mean, variance = prediction
        variance = variances_of(variance.double()) if variance.ndim == mean.ndim + 1 else variance.double()
        return mean, variance.reshape(mean.shape) + (sigma_noise * self._noise(mean.double())).square()

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :func:`laplace.likelihoods.scores.regression_scores`."""
        return regression_scores(*self._with_noise(prediction, sigma_noise), y)

    def details(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """See :func:`laplace.likelihoods.scores.regression_details`."""
        return regression_details(*self._with_noise(prediction, sigma_noise), y)

    def monitored(self, prediction: Prediction, y: Tensor | None = None, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """The differential entropy of every example's Gaussian, averaged over outputs."""
        return {"entropy": gaussian_entropy(*self._with_noise(prediction, sigma_noise), 0.0)}

    def free_noise_terms(self, prediction: Prediction, y: Tensor) -> dict[str, Tensor]:
        r"""As of one noise, in units of the ratios: :math:`\log(s^2 (1 + v / s^2))` and :math:`(y - f)^2 / (s^2 + v)`."""
        mean, variance = self._with_noise(prediction, 1.0)
        error = (y.double() - mean.double()).square() / variance
        return {"spread": variance.log().reshape(len(y), -1), "error": error.reshape(len(y), -1)}

    def tuning_loss(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> float:
        """Summed negative log likelihood of the Gaussians with the noise."""
        mean, variance = self._with_noise(prediction, sigma_noise)
        return float(((y.double() - mean.double()).square() / variance + (2 * pi * variance).log()).sum() / 2)
