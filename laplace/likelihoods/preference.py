"""Reward modelling after Bradley and Terry: fitted as a classifier of pairs, predicts the reward of a single input."""

from __future__ import annotations

from torch import Tensor

from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.categorical import Categorical
from laplace.likelihoods.gaussian import Gaussian


class Preference(Categorical):
    """The likelihood of which of two inputs is preferred, from their rewards as logits; predictions are of rewards.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from laplace.likelihoods import Preference
        >>> class Rewards(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1)
        ...     def forward(self, x):  # (batch, 2, …) of pairs, (batch, …) of single items
        ...         return self.layer(x).squeeze(-1) if x.ndim == 3 else self.layer(x)
        ...
        >>> la = Laplace(Rewards(), Preference(), "all", "kron")
        >>> la.fit([(torch.randn(8, 2, 2), torch.arange(8) % 2)])
        >>> mean, variance = la(torch.randn(5, 2))
        >>> mean.shape
        torch.Size([5, 1])
    """

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
