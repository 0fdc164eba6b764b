"""What likelihoods share whose prediction starts with log-probabilities: of classes, or of yes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace.enums import LinkApprox
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.links import variances_of
from laplace.likelihoods.predictive import Prediction
from laplace.likelihoods.scores import summarize_classification


def one_at(label: Tensor, like: Tensor) -> Tensor:
    """Ones at the labels and zeros elsewhere, of the type of outputs ``(batch, …, classes)``; no value is looked at."""
    return (label[..., None] == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


class ClassProbabilities(BaseLikelihood):
    """Base of likelihoods that are scored as classifications."""

    tuning = "gridsearch"
    scales_logits = True
    has_confidence = True

    def public(self, prediction: Prediction) -> Tensor:
        """Probabilities."""
        return prediction[0].exp()

    def log_public(self, prediction: Prediction) -> Tensor:
        """Their logarithms, finite where probabilities underflow."""
        return prediction[0]

    def check_scored(self, prediction: Prediction, y: Tensor, offset: int = 0) -> None:
        """Refuse targets that do not fit the probabilities."""
        self.check_shapes(prediction[0], y, offset)

    def moves(self, f: Tensor, variance: Tensor, link_approx: LinkApprox) -> bool:
        """The probit approximation scales logits, so that those that are zero stay so under any variance."""
        if link_approx is not LinkApprox.PROBIT:
            return super().moves(f, variance, link_approx)
        return bool(((f.flatten(1) != 0) & (variances_of(variance) != 0)).any())

    def summarize(
        self, scores: Mapping[str, Tensor], ood_confidence: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """See :func:`laplace.likelihoods.scores.summarize_classification`, over classes or labels."""
        return summarize_classification(scores, ood_confidence)
