"""What a likelihood makes of the uncertainty of its outputs: predictives, what callers get of them, and their scores.

A prediction is tensors that belong together, of the likelihood's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.enums import LinkApprox
from laplace.likelihoods.links import log_mean, output_samples, variances_of

Prediction = tuple[Tensor, ...]


class Predictive:
    """The half of :class:`laplace.likelihoods.base.BaseLikelihood` that predicts; the other one gives what is declared here.

    Beside what is explained there, a ``prediction`` is what :meth:`at`, :meth:`of_networks` or :meth:`integrate` gave;
    ``outputs`` are those of several networks ``(networks, batch, …, outputs)``; ``variance`` has the variances of the
    flattened outputs ``(batch, outputs)``, or their covariances ``(batch, outputs, outputs)``; ``link_approx`` says how to
    integrate; ``scores`` are of a whole data set, and ``ood_confidence`` the confidences on others by name; ``n_samples`` and
    ``generator`` belong to draws.
    """

    identity: str
    predicts_outputs: bool

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """See there."""
        raise NotImplementedError

    def check_shapes(self, f: Tensor, y: Tensor, offset: int = 0) -> None:
        """See there."""
        raise NotImplementedError

    def mean(self, f: Tensor) -> Tensor:
        """Mean of the target given the outputs."""
        return f

    def at(self, f: Tensor) -> Prediction:
        """The prediction of one network without uncertainty."""
        return self.of_networks(f[None])

    def of_networks(self, outputs: Tensor) -> Prediction:
        """The prediction of several networks, from their outputs ``(networks, batch, …, outputs)``; these, by default."""
        return (outputs.transpose(0, 1),)

    def diagonal_suffices(self, link_approx: LinkApprox) -> bool:
        """Whether :meth:`integrate` takes variances for covariances."""
        return False

    def integrate(
        self,
        f: Tensor,
        variance: Tensor,
        link_approx: LinkApprox,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """The prediction under a Gaussian over outputs: by :meth:`closed_form` where there is one, else from draws.

        Args:
            f: Means ``(batch, …, outputs)``.
            variance: Variances ``(batch, outputs)`` or covariances ``(batch, outputs, outputs)`` of the flattened outputs.
            link_approx: How to integrate, where there is a choice.
            n_samples: Number of draws.
            generator: Source of the draws.

        Raises:
            ValueError: If there is no such integral.
        """
        self.refuse_bridge(link_approx)
        f = f.to(variance.dtype)
        variance = variances_of(variance) if self.diagonal_suffices(link_approx) else variance
        found = self.closed_form(f, variances_of(variance).reshape(f.shape), link_approx)
        return self.of_networks(output_samples(f, variance, n_samples, generator)) if found is None else found

    def closed_form(self, f: Tensor, variance: Tensor, link_approx: LinkApprox) -> Prediction | None:
        """The prediction under independent Gaussians over the outputs, means and variances of one shape; None: draw."""
        return None

    def moves(self, f: Tensor, variance: Tensor, link_approx: LinkApprox) -> bool:
        """Whether :meth:`integrate` may give another prediction under other variances of the outputs that have any."""
        return bool(variance.any())

    def refuse_bridge(self, link_approx: LinkApprox) -> None:
        """Refuse the Laplace bridge, which is a map between softmax and Dirichlet.

        Raises:
            ValueError: If it is asked for.
        """
        if link_approx in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM):
            raise ValueError(
                f"link_approx={link_approx.value!r} is for class probabilities; {self.identity} takes 'probit' or 'mc'."
            )

    def public(self, prediction: Prediction) -> Tensor | tuple[Tensor, ...]:
        """What calling a posterior returns of a prediction; by default the mean of :meth:`mean`."""
        return self.mean(prediction[0].transpose(0, 1)).mean(0)

    def log_public(self, prediction: Prediction) -> Tensor | tuple[Tensor, ...]:
        """The same with ``log_probs=True``: logarithms of probabilities; a Gaussian over outputs stays what it is.

        Raises:
            ValueError: If there are no probabilities.
        """
        if not self.predicts_outputs:
            raise ValueError(f"log_probs=True is for class probabilities, which {self.identity} does not predict.")
        return self.public(prediction)

    def check_scored(self, prediction: Prediction, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that do not fit a prediction."""
        self.check_shapes(prediction[0][:, 0], y, offset)

    def scores(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """Scores of a prediction, each ``(terms,)`` float64; ``nll`` (nats) is among them."""
        terms = [-self.nll(f.double(), y).flatten() for f in prediction[0].unbind(1)]
        return {"nll": -log_mean(torch.stack(terms).double())}

    def details(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """What a report draws beside the scores; see :func:`laplace.likelihoods.scores.regression_details`."""
        return {}

    def confidences(self, prediction: Prediction) -> Tensor:
        """Confidence of every prediction, without targets; for likelihoods that have one."""
        raise NotImplementedError(f"{self.identity} has no confidence.")

    def monitored(self, prediction: Prediction, y: Tensor | None = None, sigma_noise: float = 1.0) -> dict[str, Tensor]:
        """What is watched for drift, each ``(terms,)`` float64: the ``entropy`` (nats) of every predictive distribution.

        Classifications have ``predicted``, and where there are targets ``label``, too. Nothing by default: of a prediction that
        is samples of outputs there is no entropy in general.
        """
        return {}

    def summarize(
        self, scores: Mapping[str, Tensor], ood_confidence: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Summary of the scores of a whole data set: means of each."""
        return {name: values.mean().item() for name, values in scores.items()}

    def tuning_loss(self, prediction: Prediction, y: Tensor, sigma_noise: float = 1.0) -> float:
        """What a grid search adds up over batches: the negative log likelihood of the prediction."""
        return float(self.scores(prediction, y, sigma_noise)["nll"].sum())
