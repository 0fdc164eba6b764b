"""What predictives, evidence, tuning and the stored state ask of a posterior, so that none of them imports one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laplace.backends.interface import CurvatureInterface
from laplace.enums import PredType, PriorStructure
from laplace.likelihoods.base import BaseLikelihood
from laplace.structures.specification import SumsSpec


class Fitted(Protocol):
    """A posterior, fitted or about to be; :class:`laplace.ParametricLaplace` and its subclasses are such."""

    model: nn.Module
    params: list[nn.Parameter]
    likelihood_object: BaseLikelihood
    pred_types: tuple[PredType, ...]
    enable_backprop: bool
    temperature: float
    logit_temperature: float
    mean: Tensor
    prior_mean: Tensor
    prior_precision: Tensor
    sigma_noise: Tensor
    n_data: int
    n_outputs: int | None
    input_ndim: int | None

    @property
    def backend(self) -> CurvatureInterface:
        """What captures and differentiates the model."""

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood of the training data at the MAP."""

    @property
    def log_det_ratio(self) -> Tensor:
        """Log determinant of the posterior precision minus that of the prior's."""

    @property
    def scatter(self) -> Tensor:
        """Squared distance of the MAP from the prior mean, in the prior's metric."""

    @property
    def _device(self) -> torch.device: ...

    @property
    def _dtype(self) -> torch.dtype: ...

    def __call__(self, x: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Posterior predictive."""

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """Laplace approximation of the evidence."""

    def initial_prior_precision(self, value: float | Tensor, structure: PriorStructure | str) -> Tensor:
        """A prior precision of the given structure."""

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Covariance of the outputs of every example, from dense Jacobians."""

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Covariance of all outputs jointly, from dense Jacobians."""

    def sample(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draw parameter vectors."""

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor: ...

    def _grid_variance(self, capture: Any, values: Sequence[float]) -> Tensor: ...

    def _check_fitted(self) -> None: ...

    def _check_weights(self) -> None: ...

    def _check_inputs(self, x: Any) -> None: ...

    def _batches(self, loader: Iterable, progress_bar: bool, what: str) -> Iterator[tuple[Any, Tensor]]: ...

    def _parts(self, x: Any, y: Tensor, every_output: bool = False) -> Iterator[tuple[int, Any, Tensor]]: ...

    def _settings(self) -> tuple[str, ...]: ...

    def _state(self) -> dict[str, Any]: ...

    def _read_state(self, state: dict[str, Any]) -> Any: ...

    def _take_state(self, content: Any) -> None: ...

    def _adopt_parameters(self, spec: SumsSpec) -> Callable[[], None]: ...
