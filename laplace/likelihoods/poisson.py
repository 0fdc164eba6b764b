r"""Counts with the log rate for an output: :math:`e^f - y f + \log y!`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log, pi

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from laplace.enums import LinkApprox
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.checks import check_finite, first_wrong, missing_dimension
from laplace.likelihoods.links import log_mean
from laplace.likelihoods.mistakes import warn_of_last_operation
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.roots import diagonal_columns

_NODES, _STEPS = 32, 60  # of the Gauss-Hermite rule over the log rate, and of Newton's method to its centre
_HALF_LOG_2PI = 0.5 * log(2 * pi)


class Poisson(BaseLikelihood):
    r"""Counts, one log rate per output; a prediction is the counts' mean and variance, and mean and variance of log rates.

    Under a log rate :math:`\mathcal N(f, s^2)` the count has mean :math:`m = e^{f + s^2/2}` and variance
    :math:`m + m^2 (e^{s^2} - 1)` (the moments of a Poisson mixed over a log-normal rate; Aitchison and Ho, "The multivariate
    Poisson-log normal distribution", Biometrika 1989). Its probability is integrated by Gauss-Hermite quadrature.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import Poisson
        >>> x, y = torch.randn(8, 2), torch.randint(5, (8, 1))
        >>> la = Laplace(torch.nn.Linear(2, 1), Poisson(), "all", "full")
        >>> la.fit([(x, y)])
        >>> la.log_marginal_likelihood().dtype
        torch.float64
    """

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that are not one count per output."""
        if y.shape != f.shape:
            raise ValueError(
                f"Counts of shape {tuple(y.shape)} do not match log rates of shape {tuple(f.shape)}; Poisson needs one count "
                "per output, so (batch, outputs)" + missing_dimension(f, y)
            )
        if y.is_floating_point():
            check_finite("The count", y, offset)
        wrong = (y < 0) | (y != y.round() if y.is_floating_point() else y < 0)
        if bool(wrong.any()):
            first, value, affected = first_wrong(wrong, y, offset)
            raise ValueError(
                f"Target {value} of example {first} is no count 0, 1, 2, …, as a Poisson needs. {affected} example(s) of this "
                "batch are affected."
            )

    def warn_of_outputs(self, f: Tensor) -> None:
        """Say so where outputs are rates, and no log rates."""
        warn_of_last_operation(f, {"ExpBackward0": "an exponential", "SoftplusBackward0": "a softplus"}, "log rates")

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Negative log probability of the counts, summed over the outputs of a position."""
        return _nll(f, y.to(f.dtype)).sum(-1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Rates minus counts."""
        return f.exp() - y.to(f.dtype)

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The Hessian is diagonal, with the rates."""
        return diagonal_columns((0.5 * f).exp())

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        r"""The smallest count :math:`k` with :math:`P(Y \leq k) = Q(k + 1, \lambda) \geq u`, by bisection."""
        rate = f.double().exp()
        low, high = torch.full_like(rate, -1.0), (rate + 40 * rate.sqrt() + 60).ceil()
        for _ in range(int(high.max().log2()) + 2):
            middle = ((low + high) / 2).floor()
            enough = torch.special.gammaincc(middle + 1, rate) >= u
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high.to(f.dtype)

    def mean(self, f: Tensor) -> Tensor:
        """Rates."""
        return f.exp()

    def at(self, f: Tensor) -> Prediction:
        """The Poisson of one network."""
        return f.exp(), f.exp(), f[None], torch.zeros_like(f[None])

    def of_networks(self, outputs: Tensor) -> Prediction:
        """The mixture of several networks' Poissons, equally weighted."""
        rates = outputs.exp()
        mean, spread = rates.mean(0), rates.var(0, correction=0)
        return mean, mean + spread, outputs, torch.zeros_like(outputs)

    def diagonal_suffices(self, link_approx: LinkApprox) -> bool:
        """Counts are predicted one by one."""
        return True

    def closed_form(self, f: Tensor, variance: Tensor, link_approx: LinkApprox) -> Prediction | None:
        """The mixture over a log-normal rate, exactly; draws for ``'mc'``."""
        if link_approx is LinkApprox.MC:
            return None
        mean = (f + variance / 2).exp()
        return mean, mean + mean.square() * variance.expm1(), f[None], variance[None]

    def public(self, prediction: Prediction) -> tuple[Tensor, ...]:
        """Mean and variance of the counts, ``(batch, outputs)`` each."""
        return prediction[:2]

    def check_scored(self, prediction: Prediction, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that do not fit the means."""
        self.check_shapes(prediction[0], y, offset)

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """``nll`` (nats) and ``squared_error`` of the mean, of every count."""
        mean, _, log_rates, variances = (part.detach().double() for part in prediction)
        y = y.double()
        nll = -log_mean(_log_mixed(log_rates, variances, y))
        return {"nll": nll.flatten(), "squared_error": (mean - y).square().flatten()}

    def summarize(
        self, scores: Mapping[str, Tensor], ood_confidence: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """NLL and root mean squared error."""
        return {"nll": scores["nll"].mean().item(), "rmse": scores["squared_error"].mean().sqrt().item()}


def _nll(f: Tensor, y: Tensor) -> Tensor:
    return f.exp() - y * f + torch.lgamma(y + 1)


def _log_mixed(f: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    r"""Log probability of counts under a log rate :math:`f + \sqrt v z` with standard normal :math:`z`.

    By a Gauss-Hermite rule around the integrand's mode in :math:`z`, as wide as its curvature there (Liu and Pierce, "A note
    on Gauss-Hermite quadrature", Biometrika 1994): of large counts the integrand is far narrower than the Gaussian.
    """
    s = variance.sqrt()
    z = torch.where(s > 0, ((y + 0.5).log() - f).clamp(min=0) / s.clamp(min=torch.finfo(s.dtype).tiny), 0)
    for _ in range(_STEPS):  # Newton from the right of the mode, where its steps cannot overshoot
        rate = (f + s * z).exp()
        z = z + (s * (y - rate) - z) / (1 + variance * rate)
    width = (1 + variance * (f + s * z).exp()).rsqrt()
    nodes, weights = (torch.tensor(t, dtype=f.dtype, device=f.device) for t in hermegauss(_NODES))
    shape = (-1, *[1] * f.ndim)
    x = nodes.reshape(shape)
    z = z + width * x
    terms = (weights.log() - _HALF_LOG_2PI).reshape(shape) + width.log() + (x.square() - z.square()) / 2
    return (terms - _nll(f + s * z, y)).logsumexp(0)
