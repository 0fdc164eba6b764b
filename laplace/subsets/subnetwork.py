"""Posteriors over a subnetwork: some entries of the parameter vector have a distribution, the others stay at the MAP.

The idea and its selection strategies are those of Daxberger et al., "Bayesian Deep Learning via Subnetwork Inference"
(ICML 2021). Only the tensors that hold chosen entries are differentiated, and only the chosen entries of a row are
kept.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from laplace.enums import PriorStructure
from laplace.linalg.dense import parameter_vector
from laplace.posterior.arguments import before, by_name
from laplace.posterior.diag import DiagLaplace
from laplace.posterior.full import FullLaplace
from laplace.posterior.parametric import ParametricLaplace
from laplace.prior import weighted_sum
from laplace.structures.subnetwork import check_subnetwork_indices, given_order, split_indices
from laplace.structures.sums import CurvatureSums

_BY_NAME = {"enable_backprop", "dict_key_x", "dict_key_y"}  # have no documented position


class SubnetLaplace(ParametricLaplace):
    """Base of the subnetwork posteriors; the structures' algebra is that of their siblings, over the subnetwork.

    Args:
        subnetwork_indices: Indices of the vector of all parameters with ``requires_grad``
            (``parameters_to_vector(p for p in model.parameters() if p.requires_grad)``), a LongTensor without repeats. All
            results are in their order; see :mod:`laplace.utils.subnetmask`.
        **kwargs: Further arguments of :class:`laplace.BaseLaplace`. ``prior_precision`` is a scalar or has one
            value per subnetwork parameter; ``prior_mean`` may also have one value per parameter of the model.

    Attributes:
        subnetwork_indices: As given, on the model's device.
        n_params: Number of parameters of the model.
        n_params_subnet: Number of parameters of the subnetwork.
        mean: MAP estimate of all parameters ``(parameters,)``.

    Raises:
        TypeError: If the indices are missing.
        ValueError: If they are not a 1-D LongTensor, repeated or out of range, or if the backend cannot work on a subnetwork.
    """

    order = tuple(n for n in before(ParametricLaplace.order, "sigma_noise", "subnetwork_indices") if n not in _BY_NAME)

    @by_name
    def __init__(self, *, subnetwork_indices: torch.LongTensor, **kwargs: Any):
        """See the class."""
        self.subnetwork_indices = subnetwork_indices
        super().__init__(**kwargs)
        self._check_backend()

    def _check_backend(self) -> None:
        """Refuse now what would fail in the fit."""
        cls = self._backend_cls
        if cls is None:
            return
        if not cls.has_structure(self.structure):
            raise ValueError(
                f"{cls.__name__} has no {self.structure!r} curvature, so it cannot be the backend of a "
                f"{type(self).__name__}. Use NativeGGN, or another backend that has."
            )
        arguments = inspect.signature(cls.__init__).parameters.values()
        if not any(a.name == "subnetwork_indices" or a.kind is a.VAR_KEYWORD for a in arguments):
            raise ValueError(
                f"{cls.__name__} takes no subnetwork_indices, so it cannot be the backend of a {type(self).__name__}. Use "
                "NativeGGN, or another backend that does."
            )

    def _set_sizes(self) -> None:
        n_params = sum(p.numel() for p in self.params)
        self.subnetwork_indices = check_subnetwork_indices(self.subnetwork_indices, n_params).to(self._device)
        self.n_params_subnet = len(self.subnetwork_indices)
        self._order = given_order(self.subnetwork_indices)
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
    def _tensor_sizes(self) -> list[int]:
        return [self.n_params_subnet]

    @property
    def scatter(self) -> Tensor:
        r""":math:`(\theta - \mu_0)^\top P_0 (\theta - \mu_0)` over the subnetwork."""
        delta = self.mean_subnet.double() - self._of_subnet(self.prior_mean).double()
        return weighted_sum(self.prior_precision, delta.square(), self._tensor_sizes)

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta`; ``value`` holds the subnetwork's parameters, or all of them."""
        return super().square_norm(self._of_subnet(value))

    def _prior_mean_vector(self) -> Tensor:
        mean = parameter_vector(self.params).detach().to(self._dtype)
        mean[self.subnetwork_indices] = self._of_subnet(self.prior_mean)
        return mean

    def _inferred(self, value: Tensor) -> Tensor:
        return self._of_subnet(value)

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

        Raises:
            ValueError: If the draws are of another shape, such as those of :meth:`sample`, which are whole already.
        """
        size = len(self.subnetwork_indices)
        if subnet_samples.ndim != 2 or subnet_samples.shape[1] != size:
            raise ValueError(
                f"Draws of the subnetwork have shape (n_samples, {size}), and these {tuple(subnet_samples.shape)}. What "
                "la.sample() returns is assembled already."
            )
        samples = self.mean.to(subnet_samples.dtype).repeat(len(subnet_samples), 1)
        samples[:, self.subnetwork_indices] = subnet_samples
        return samples


class FullSubnetLaplace(SubnetLaplace, FullLaplace):
    """Dense posterior over a subnetwork.

    Example:
        >>> import torch
        >>> from laplace import FullSubnetLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = FullSubnetLaplace(model, "classification", subnetwork_indices=torch.tensor([0, 5, 9]))
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
        >>> la.posterior_precision.shape
        torch.Size([3, 3])
    """

    _reordered: Tensor | None = None

    def _finalize(self, sums: CurvatureSums) -> None:
        self._reordered = None
        super()._finalize(sums)

    @property
    def _curvature(self) -> Tensor:
        if self._order is None:
            return super()._curvature
        if self._reordered is None:
            self._reordered = super()._curvature[self._order][:, self._order]
        return self._reordered

    def _in_own_order(self, values: Tensor) -> Tensor:
        return values if self._order is None else values[..., self._order]


class DiagSubnetLaplace(SubnetLaplace, DiagLaplace):
    """Diagonal posterior over a subnetwork.

    Example:
        >>> import torch
        >>> from laplace import DiagSubnetLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = DiagSubnetLaplace(model, "classification", subnetwork_indices=torch.tensor([0, 5, 9]))
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
        >>> la.posterior_precision.shape
        torch.Size([3])
    """

    def _finalize(self, sums: CurvatureSums) -> None:
        super()._finalize(sums)
        self._diagonal = self._diagonal if self._order is None else self._diagonal[self._order]

    def _in_order_of_sums(self, values: Tensor) -> Tensor:
        return values if self._order is None else values[self._order.argsort()]
