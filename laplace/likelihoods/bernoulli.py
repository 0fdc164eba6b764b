r"""Yes or no for every output: :math:`\log(1 + e^f) - y f`; one logit, or several labels that do not exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from laplace.enums import LinkApprox
from laplace.likelihoods.checks import check_finite, first_wrong
from laplace.likelihoods.links import log_mean, probit_scale
from laplace.likelihoods.mistakes import warn_of_last_operation
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.probabilities import ClassProbabilities
from laplace.likelihoods.roots import diagonal_columns


class Bernoulli(ClassProbabilities):
    """Binary labels, one logit each; a prediction is the log-probabilities of yes and of no.

    Targets are 0 or 1 (bool, integer or float), or probabilities in between; they have the outputs' shape ``(batch, labels)``,
    or ``(batch,)`` where there is one logit. Calling a posterior returns probabilities of yes ``(batch, labels)``.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import Bernoulli
        >>> x, y = torch.randn(8, 2), torch.randint(2, (8, 1))
        >>> la = Laplace(torch.nn.Linear(2, 1), Bernoulli(), "all", "full")
        >>> la.fit([(x, y)])
        >>> la(x).shape
        torch.Size([8, 1])
    """

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that are not one value in 0…1 for every logit."""
        if y.shape not in (f.shape, *([f.shape[:-1]] if f.shape[-1] == 1 else [])):
            raise ValueError(
                f"Targets of shape {tuple(y.shape)} do not match logits of shape {tuple(f.shape)}; Bernoulli needs a 0 or 1 "
                "for every logit. Class numbers need likelihood='classification', with a logit per class."
            )
        if y.is_floating_point():
            check_finite("The binary target", y, offset)
        wrong = (y < 0) | (y > 1)
        if bool(wrong.any()):
            first, value, affected = first_wrong(wrong, y, offset)
            raise ValueError(
                f"Target {value} of example {first} is not in 0…1, as a Bernoulli needs. {affected} example(s) of this batch "
                "are affected. Class numbers need likelihood='classification', with a logit per class."
            )

    def warn_of_outputs(self, f: Tensor) -> None:
        """Say so where outputs are probabilities, and no logits."""
        warn_of_last_operation(f, {"SigmoidBackward0": "a sigmoid"}, "logits")

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Binary cross entropy, summed over the labels of a position."""
        return binary_cross_entropy_with_logits(f, _like(f, y), reduction="none").sum(-1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Probabilities minus targets."""
        return f.sigmoid() - _like(f, y)

    def root_columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        r"""The Hessian is diagonal, with :math:`p (1 - p)`."""
        return diagonal_columns((0.5 * (logsigmoid(f) + logsigmoid(-f))).exp())

    def draw(self, f: Tensor, u: Tensor) -> Tensor:
        """Yes where the uniform number is below the probability."""
        return (u < f.double().sigmoid()).to(f.dtype)

    def mean(self, f: Tensor) -> Tensor:
        """Probabilities."""
        return f.sigmoid()

    def at(self, f: Tensor) -> Prediction:
        """Log-probabilities of one network."""
        return logsigmoid(f), logsigmoid(-f)

    def of_networks(self, outputs: Tensor) -> Prediction:
        """Logarithms of the mean probabilities of several networks."""
        return log_mean(logsigmoid(outputs)), log_mean(logsigmoid(-outputs))

    def diagonal_suffices(self, link_approx: LinkApprox) -> bool:
        """Labels are predicted one by one."""
        return True

    def closed_form(self, f: Tensor, variance: Tensor, link_approx: LinkApprox) -> Prediction | None:
        """The sigmoid under a Gaussian by MacKay's probit approximation; draws for ``'mc'``."""
        return None if link_approx is LinkApprox.MC else self.at(probit_scale(variance) * f)

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """``confidence``, ``correct``, ``nll`` and ``brier`` of every label, as for a classification of two classes."""
        yes, no = (part.detach().double() for part in prediction)
        y = _like(yes, y).double()
        p, nll = yes.exp(), -(torch.where(y > 0, y * yes, 0) + torch.where(y < 1, (1 - y) * no, 0))
        found = {
            "confidence": self.confidences(prediction),
            "correct": ((p > 0.5) == (y > 0.5)).double(),
            "nll": nll,
            "brier": 2 * (p - y).square(),
        }
        return {name: values.flatten() for name, values in found.items()}

    def confidences(self, prediction: Prediction) -> Tensor:
        """Probability of the likelier answer to every label."""
        return torch.maximum(*prediction).detach().double().exp().flatten()

    def monitored(self, prediction: Prediction, y: Tensor | None = None, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """The entropy of every label."""
        return {"entropy": sum(torch.special.entr(part.detach().double().exp()).flatten() for part in prediction)}


def _like(f: Tensor, y: Tensor) -> Tensor:
    return y.to(f.dtype).reshape(f.shape)
