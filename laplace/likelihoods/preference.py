"""Reward modelling after Bradley and Terry: fitted as a classifier of pairs, predicts the reward of a single input."""

from __future__ import annotations

from torch import Tensor

from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.categorical import Categorical
from laplace.likelihoods.gaussian import Gaussian


class Preference(Categorical):
    """The likelihood of which of two inputs is preferred, from their rewards as logits; predictions are of rewards."""

    structures = ("kron", "ekfac", "diag")
    scales_logits = False  # what is predicted are rewards

    @property
    def word(self) -> Likelihood:
        """Reward modelling."""
        return Likelihood.REWARD_MODELING

    @property
    def fitted(self) -> BaseLikelihood:
        """The classifier of pairs."""
        return Categorical()

    def predicting(self, fitting: bool) -> BaseLikelihood:
        """The Gaussian over the reward; the classifier of pairs if ``fitting``."""
        return self.fitted if fitting else Gaussian()

    def mean(self, f: Tensor) -> Tensor:
        """The reward."""
        return f
