"""Posteriors over a subnetwork: some entries of the parameter vector have a distribution, the others stay at the MAP.

The idea and its selection strategies are those of Daxberger et al., "Bayesian Deep Learning via Subnetwork Inference"
(ICML 2021). Only the tensors that hold chosen entries are differentiated, and only the chosen entries of a row are
kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace.enums import PriorStructure
from laplace.posterior.arguments import before, by_name
from laplace.posterior.diag import DiagLaplace
from laplace.posterior.full import FullLaplace
from laplace.posterior.parametric import ParametricLaplace
from laplace.structures.subnetwork import check_subnetwork_indices, split_indices

_BY_NAME = {"enable_backprop", "dict_key_x", "dict_key_y"}  # have no documented position


class SubnetLaplace(ParametricLaplace):
    """Base of the subnetwork posteriors; the structures' algebra is that of their siblings, over the subnetwork.

    Args:
        subnetwork_indices: Indices of the vector of all parameters with ``requires_grad``
            (``parameters_to_vector(p for p in model.parameters() if p.requires_grad)``), a sorted LongTensor without
            repeats; see :mod:`laplace.utils.subnetmask`.
        **kwargs: Further arguments of :class:`laplace.BaseLaplace`. ``prior_precision`` is a scalar or has one
            value per subnetwork parameter; ``prior_mean`` may also have one value per parameter of the model.

    Attributes:
        subnetwork_indices: As given, on the model's device.
        n_params: Number of parameters of the model.
        n_params_subnet: Number of parameters of the subnetwork.
        mean: MAP estimate of all parameters ``(parameters,)``.

    Raises:
        ValueError: If the indices are missing, not a 1-D LongTensor, unsorted, repeated or out of range.
    """

    order = tuple(n for n in before(ParametricLaplace.order, "sigma_noise", "subnetwork_indices") if n not in _BY_NAME)

    @by_name
    def __init__(self, *, subnetwork_indices: torch.LongTensor | None = None, **kwargs: Any):
        """See the class."""
        self.subnetwork_indices = subnetwork_indices
        super().__init__(**kwargs)

    def _set_sizes(self) -> None:
        n_params = sum(p.numel() for p in self.params)
        self.subnetwork_indices = check_subnetwork_indices(self.subnetwork_indices, n_params).to(self._device)
        self.n_params_subnet = len(self.subnetwork_indices)
        super()._set_sizes()

    def _backend_arguments(self) -> dict[str, Any]:
        return {"subnetwork_indices": self.subnetwork_indices, **super()._backend_arguments()}

    def _kept_shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
        split = split_indices(self.subnetwork_indices, {str(i): p.numel() for i, p in enumerate(self.params)})
        return [(tuple(self.params[int(i)].shape), chosen) for i, chosen in split.items()]

    @property
    def mean_subnet(self) -> Tensor:
        """MAP estimate of the subnetwork ``(subnetwork parameters,)``."""
        return self.mean[self.subnetwork_indices]

    @property
    def _mean_inferred(self) -> Tensor:
        return self.mean_subnet

    @property
    def _prior_sizes(self) -> dict[PriorStructure, int]:
        return {PriorStructure.SCALAR: 1, PriorStructure.DIAG: self.n_params_subnet}

    @property
    def prior_precision_diag(self) -> Tensor:
        """Precision of the prior, one value per subnetwork parameter ``(subnetwork parameters,)``."""
        return self.prior_precision.expand(self.n_params_subnet)

    @property
    def scatter(self) -> Tensor:
        r""":math:`(\theta - \mu_0)^\top P_0 (\theta - \mu_0)` over the subnetwork."""
        delta = self.mean_subnet.double() - self._of_subnet(self.prior_mean).double()
        return (delta * self.prior_precision_diag.double() * delta).sum()

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta`; ``value`` holds the subnetwork's parameters, or all of them."""
        return super().square_norm(self._of_subnet(value))

    def _of_subnet(self, value: Tensor) -> Tensor:
        if value.ndim and value.shape[-1] == self.n_params:
            return value[..., self.subnetwork_indices]
        return value

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw vectors of all parameters ``(n_samples, parameters)``; those outside the subnetwork are the MAP's."""
        return self.assemble_full_samples(super().sample(n_samples, generator))

    def assemble_full_samples(self, subnet_samples: Tensor) -> Tensor:
        """Put draws of the subnetwork into copies of the MAP estimate.

        Args:
            subnet_samples: ``(n_samples, subnetwork parameters)``.

        Returns:
            ``(n_samples, parameters)``.
        """
        samples = self.mean.to(subnet_samples.dtype).repeat(len(subnet_samples), 1)
        samples[:, self.subnetwork_indices] = subnet_samples
        return samples


class FullSubnetLaplace(SubnetLaplace, FullLaplace):
    """Dense posterior over a subnetwork."""


class DiagSubnetLaplace(SubnetLaplace, DiagLaplace):
    """Diagonal posterior over a subnetwork."""
