"""Subnetworks of the parameters with the largest scores: at random, by magnitude, or by variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.named import NamedLikelihood
from laplace.posterior.diag import DiagLaplace
from laplace.subsets.masks import SubnetMask, required
from laplace.subsets.swag import fit_diagonal_swag_var


class ScoreBasedSubnetMask(SubnetMask):
    """The parameters with the largest scores.

    Args:
        model: Trained network.
        n_params_subnet: Number of parameters to choose.

    Example:
        >>> import torch
        >>> from laplace.utils.subnetmask import ScoreBasedSubnetMask
        >>> class SmallestMagnitude(ScoreBasedSubnetMask):
        ...     def compute_param_scores(self, train_loader):
        ...         return -self.parameter_vector.abs()
        ...
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> indices = SmallestMagnitude(model, n_params_subnet=5).select()
        >>> len(indices)
        5
    """

    def __init__(self, model: nn.Module, n_params_subnet: int):
        """See the class."""
        super().__init__(model)
        if n_params_subnet is None or not 0 < n_params_subnet <= self._n_params:
            raise ValueError(
                f"n_params_subnet={n_params_subnet} must lie in 1…{self._n_params}, the number of parameters."
            )
        self._n_params_subnet = n_params_subnet

    @property
    def n_params_subnet(self) -> int:
        """Number of chosen parameters."""
        return self._n_params_subnet

    def compute_param_scores(self, train_loader: DataLoader | None) -> Tensor:
        """The strategy: one score per parameter; the largest win.

        Args:
            train_loader: What :meth:`select` was given.

        Returns:
            Scores ``(parameters,)``.
        """
        raise NotImplementedError

    def get_subnet_mask(self, train_loader: DataLoader | None) -> Tensor:
        """Ones on the parameters with the largest scores.

        Raises:
            ValueError: If the scores do not fit the model or are NaN.
        """
        scores = self.compute_param_scores(train_loader)
        if scores.shape != (self._n_params,):
            raise ValueError(f"The scores have shape {tuple(scores.shape)}, expected ({self._n_params},).")
        if bool(scores.isnan().any()):
            raise ValueError(f"{int(scores.isnan().sum())} of the scores are NaN; look at the model's weights.")
        mask = torch.zeros(self._n_params, dtype=torch.bool, device=scores.device)
        mask[scores.topk(self._n_params_subnet).indices] = True
        return mask


class RandomSubnetMask(ScoreBasedSubnetMask):
    """Uniformly at random, from torch's global generator.

    Example:
        >>> import torch
        >>> from laplace.utils import RandomSubnetMask
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> indices = RandomSubnetMask(model, n_params_subnet=5).select()
        >>> len(indices)
        5
    """

    def compute_param_scores(self, train_loader: DataLoader | None) -> Tensor:
        """Uniform noise."""
        return torch.rand(self._n_params, device=self.parameter_vector.device)


class LargestMagnitudeSubnetMask(ScoreBasedSubnetMask):
    """The largest absolute values.

    Example:
        >>> import torch
        >>> from laplace.utils import LargestMagnitudeSubnetMask
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> indices = LargestMagnitudeSubnetMask(model, n_params_subnet=5).select()
        >>> len(indices)
        5
    """

    def compute_param_scores(self, train_loader: DataLoader | None) -> Tensor:
        """Absolute values."""
        return self.parameter_vector.abs()


class LargestVarianceDiagLaplaceSubnetMask(ScoreBasedSubnetMask):
    """The largest posterior variances of a diagonal Laplace approximation over all weights.

    Args:
        model: Trained network.
        n_params_subnet: Number of parameters to choose.
        diag_laplace_model: A :class:`laplace.DiagLaplace` of the same model; :meth:`select` fits it.

    Example:
        >>> import torch
        >>> from laplace import DiagLaplace
        >>> from laplace.utils import LargestVarianceDiagLaplaceSubnetMask
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = DiagLaplace(model, "classification")
        >>> indices = LargestVarianceDiagLaplaceSubnetMask(model, n_params_subnet=5, diag_laplace_model=la).select([(x, y)])
        >>> len(indices)
        5
    """

    def __init__(self, model: nn.Module, n_params_subnet: int, diag_laplace_model: DiagLaplace):
        """See the class."""
        super().__init__(model, n_params_subnet)
        self.diag_laplace_model = diag_laplace_model

    def compute_param_scores(self, train_loader: DataLoader | None) -> Tensor:
        """Posterior variances after a fit to the data."""
        self.diag_laplace_model.fit(required(train_loader))
        return self.diag_laplace_model.posterior_variance.detach()


class LargestVarianceSWAGSubnetMask(ScoreBasedSubnetMask):
    """The largest variances along a run of SGD; see :func:`laplace.utils.fit_diagonal_swag_var`.

    Args:
        model: Trained network.
        n_params_subnet: Number of parameters to choose.
        likelihood: ``'classification'`` (cross entropy) or ``'regression'`` (mean squared error).
        swag_n_snapshots: Number of snapshots.
        swag_snapshot_freq: Epochs between two snapshots.
        swag_lr: Step size of SGD.

    Example:
        >>> import torch
        >>> from laplace.utils import LargestVarianceSWAGSubnetMask
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> indices = LargestVarianceSWAGSubnetMask(model, n_params_subnet=5, swag_n_snapshots=3).select([(x, y)])
        >>> len(indices)
        5
    """

    likelihood = NamedLikelihood()
    likelihood_object: BaseLikelihood

    def __init__(
        self,
        model: nn.Module,
        n_params_subnet: int,
        likelihood: BaseLikelihood | Likelihood | str = Likelihood.CLASSIFICATION,
        swag_n_snapshots: int = 40,
        swag_snapshot_freq: int = 1,
        swag_lr: float = 0.01,
    ):
        """See the class."""
        super().__init__(model, n_params_subnet)
        self.likelihood = likelihood
        self._swag: dict[str, Any] = {
            "n_snapshots_total": swag_n_snapshots,
            "snapshot_freq": swag_snapshot_freq,
            "lr": swag_lr,
        }

    def compute_param_scores(self, train_loader: DataLoader | None) -> Tensor:
        """Variances over snapshots."""

        def criterion(f: Tensor, y: Tensor) -> Tensor:
            return self.likelihood_object.training_loss(f, y)[0]

        return fit_diagonal_swag_var(self.model, required(train_loader), criterion, **self._swag)
