"""Posteriors over the linear last layer alone; the structures' algebra is that of their siblings over all weights."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.evaluation import eval_mode
from laplace.capture.feature_extractor import FeatureExtractor, FeatureReduction
from laplace.data.batches import few
from laplace.data.calling import called_by_batch
from laplace.posterior.arguments import before, by_name, check_model
from laplace.posterior.diag import DiagLaplace
from laplace.posterior.ekfac import EKFACLaplace
from laplace.posterior.full import FullLaplace
from laplace.posterior.functional import OWN_ARGUMENTS, FunctionalLaplace
from laplace.posterior.kron import KronLaplace
from laplace.posterior.parametric import ParametricLaplace
from laplace.predictive import glm_distribution
from laplace.structures.specification import SumsSpec

_ORDER = before(before(ParametricLaplace.order, "dict_key_x", "feature_reduction"), "backend_kwargs", "last_layer_name")


class LLLaplace(ParametricLaplace):
    """Base of the last-layer posteriors.

    Args:
        model: Network that ends in :class:`torch.nn.Linear`.
        enable_backprop: Keep the graph from the inputs to the predictive.
        feature_reduction: How features with a position dimension are reduced, as the model itself does it.
        last_layer_name: Name of the last layer; found by a forward pass if None.
        **kwargs: Further arguments of :class:`laplace.BaseLaplace`.
    """

    order = _ORDER

    @by_name
    def __init__(
        self,
        *,
        model: nn.Module,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        last_layer_name: str | None = None,
        **kwargs: Any,
    ):
        """See the class."""
        check_model(model)
        if isinstance(model, FeatureExtractor):
            last_layer_name = last_layer_name or model.last_layer_name
            model, feature_reduction = model.model, feature_reduction or model.feature_reduction
        model = called_by_batch(model, kwargs.get("dict_key_y", "labels"))
        extractor = FeatureExtractor(model, last_layer_name, enable_backprop, feature_reduction=feature_reduction)
        super().__init__(model=extractor, enable_backprop=enable_backprop, **kwargs)

    @property
    def enable_backprop(self) -> bool:
        """Whether the graph from the inputs to the predictive is kept."""
        return self.model.enable_backprop

    @enable_backprop.setter
    def enable_backprop(self, value: bool) -> None:
        self.model.enable_backprop = value

    @property
    def feature_reduction(self) -> FeatureReduction | None:
        """How features with a position dimension are reduced."""
        return self.model.feature_reduction

    @feature_reduction.setter
    def feature_reduction(self, value: FeatureReduction | str | None) -> None:
        self.model.feature_reduction = value

    def _settings(self) -> tuple[str, ...]:
        return (*super()._settings(), "feature_reduction")

    def functional_variance_fast(self, X: Tensor | MutableMapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean and variances of every output by itself, ``(batch, outputs)`` each, without covariances between outputs.

        The documentation names the variances alone; laplace-torch 0.3 returns both, and so does this.

        Args:
            X: Inputs ``(batch, …)`` or a dict-like batch.

        Raises:
            NotFittedError: Before ``fit``.
        """
        self._check_fitted()
        self._check_weights()
        return glm_distribution(self, X, diagonal=True)

    def _find_params(self) -> None:
        if self.model.last_layer_name is None:
            self.params: list[nn.Parameter] = []
            self.prior_precision, self.prior_mean = self._prior_precision_argument, self._prior_mean_argument
            return
        self.params = [p for p in self.model.last_layer.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError(f"The last layer {self.model.last_layer_name!r} has no parameter with requires_grad=True.")
        self._set_sizes()

    def _backend_arguments(self) -> dict[str, Any]:
        return {"last_layer": True, **super()._backend_arguments()}

    def initialize(self, x: Tensor | MutableMapping[str, Any]) -> SumsSpec:
        """Find the last layer, or check the one that was named, and decide how its curvature is obtained.

        Raises:
            ValueError: If the model's output is not that of a linear last layer.
        """
        with (
            eval_mode(self.model),
            torch.no_grad(),
        ):  # of every batch, it is checked again that the output is the layer's
            if self.model.last_layer_name is None:
                self.model.find_last_layer(few(x))
                self._find_params()
            else:
                self.model.check_last_layer(few(x))
        return super().initialize(x)

    def _adopt_parameters(self, spec: SumsSpec) -> Callable[[], None]:
        if self.model.last_layer_name is not None:
            return super()._adopt_parameters(spec)
        self.model.set_last_layer(spec.blocks[0].layer)
        self._find_params()
        return self._forget_parameters

    def _forget_parameters(self) -> None:
        self.model.last_layer_name = None
        self._find_params()


class FullLLLaplace(LLLaplace, FullLaplace):
    """Dense posterior over the last layer.

    Example:
        >>> import torch
        >>> from laplace import FullLLLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = FullLLLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """


class KronLLLaplace(LLLaplace, KronLaplace):
    """Kronecker-factored posterior over the last layer.

    Example:
        >>> import torch
        >>> from laplace import KronLLLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = KronLLLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    order = before(LLLaplace.order, "backend_kwargs", "damping")


class EKFACLLLaplace(LLLaplace, EKFACLaplace):
    """Posterior over the last layer with eigenvalue-corrected Kronecker factors.

    Example:
        >>> import torch
        >>> from laplace import EKFACLLLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = EKFACLLLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """


class DiagLLLaplace(LLLaplace, DiagLaplace):
    """Diagonal posterior over the last layer.

    Example:
        >>> import torch
        >>> from laplace import DiagLLLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = DiagLLLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """


class FunctionalLLLaplace(LLLaplace, FunctionalLaplace):
    """Gaussian-process posterior of the last layer.

    Example:
        >>> import torch
        >>> from laplace import FunctionalLLLaplace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> la = FunctionalLLLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x).shape  # probabilities
        torch.Size([8, 3])
    """

    order = (*before(LLLaplace.order, "sigma_noise", "n_subset")[:-1], *OWN_ARGUMENTS)
