"""What every Laplace approximation has: a model, a likelihood, a Gaussian prior, a backend."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace import tuning
from laplace.backends.interface import CurvatureInterface
from laplace.backends.native import NativeGGN
from laplace.capture import admission
from laplace.capture.feature_extractor import FeatureExtractor
from laplace.data.calling import called_by_batch
from laplace.enums import Likelihood, LinkApprox, PredType, PriorStructure
from laplace.interpolation import interpolation_for
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.named import NamedLikelihood
from laplace.posterior.arguments import ORDER, by_name, check_model, signature
from laplace.posterior.hyperparameters import Hyperparameters
from laplace.temperature import optimize_logit_temperature


class BaseLaplace(Hyperparameters):
    r"""Model, likelihood :math:`p(y \mid f)`, prior :math:`\mathcal N(\mu_0, \mathrm{diag}(p_0)^{-1})` and backend.

    Args:
        model: Trained network; its parameters with ``requires_grad`` are the MAP estimate.
        likelihood: ``'classification'``, ``'regression'``, ``'reward_modeling'`` (fitted as classification, predicts as
            regression), or an object of :mod:`laplace.likelihoods`.
        sigma_noise: Standard deviation of the observation noise; 1 for all likelihoods but regression.
        prior_precision: Scalar, one value per parameter tensor, or one per parameter.
        prior_mean: Scalar or one value per parameter.
        temperature: Temperature of the likelihood; lower is more concentrated.
        enable_backprop: Keep the graph from the inputs to the predictive.
        dict_key_x: Key of the inputs in dict-like batches.
        dict_key_y: Key of the targets in dict-like batches.
        backend: Subclass of :class:`CurvatureInterface`; the native exact GGN if None.
        backend_kwargs: Further arguments of the backend.
        asdl_fisher_kwargs: Further arguments of :class:`laplace.curvature.AsdlGGN` under ASDL's names.

    Raises:
        ValueError: If an argument is unknown or out of range; the message lists what is valid.
    """

    order = ORDER
    likelihood = NamedLikelihood()

    def __init_subclass__(cls, **kwargs: Any):
        """Show every documented argument of a class; a class with a constructor of its own shows that."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature(cls) if hasattr(cls.__init__, "__wrapped__") else None

    @by_name
    def __init__(
        self,
        model: nn.Module,
        likelihood: BaseLikelihood | Likelihood | str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
    ):
        """See the class."""
        self.likelihood = likelihood
        self.model = called_by_batch(check_model(model), dict_key_y)
        self.temperature = temperature
        self.enable_backprop = enable_backprop
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        self._backend_cls = backend
        self._backend_kwargs = dict(backend_kwargs or {})
        self._backend: CurvatureInterface | None = None
        self._asdl_fisher_kwargs = asdl_fisher_kwargs
        self.loss: Tensor | float = 0.0
        self.n_data = 0
        self.n_outputs: int | None = None
        self._mean: Tensor | None = None
        self._prior_precision_argument = prior_precision
        self._prior_mean_argument = prior_mean
        admission.check_model(model.model if isinstance(model, FeatureExtractor) else model)
        self._find_params()
        self.sigma_noise = sigma_noise

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: without the graphs that evidence at a tensor with gradients leaves behind."""
        return {
            name: value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value
            for name, value in self.__dict__.items()
        }

    def _find_params(self) -> None:
        """Take over the parameters and, now that their number is known, the prior."""
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("The model has no parameter with requires_grad=True, so there is nothing to infer.")
        self._set_sizes()

    def _set_sizes(self) -> None:
        self.n_params = sum(p.numel() for p in self.params)
        self.n_layers = len(self.params)
        self.prior_precision = self._prior_precision_argument
        self.prior_mean = self._prior_mean_argument

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        first = (
            self.params[0] if self.params else next(self.model.parameters())
        )  # the backend's sums are of the same type
        return torch.promote_types(first.dtype, torch.float32)

    def _backend_arguments(self) -> dict[str, Any]:
        arguments = {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y, **self._backend_kwargs}
        if self._asdl_fisher_kwargs:
            if not getattr(self._backend_cls, "takes_fisher_kwargs", False):
                raise ValueError(
                    "asdl_fisher_kwargs are for backend=AsdlGGN alone; give other backends backend_kwargs."
                )
            arguments["asdl_fisher_kwargs"] = self._asdl_fisher_kwargs
        return arguments

    @property
    def backend(self) -> CurvatureInterface:
        """The curvature backend, made on first use."""
        if self._backend is None:
            cls = self._backend_cls or NativeGGN
            fitted = self.likelihood_object.fitted
            likelihood = fitted if fitted.word is None else fitted.word.value
            self._backend = cls(self.model, likelihood, **self._backend_arguments())
        self._backend.dict_key_x, self._backend.dict_key_y = self.dict_key_x, self.dict_key_y
        return self._backend

    @property
    def likelihood_object(self) -> BaseLikelihood:
        """The likelihood of the targets itself; set it, or ``likelihood``, before ``fit``."""
        return self._likelihood_object

    @likelihood_object.setter
    def likelihood_object(self, value: BaseLikelihood) -> None:
        before = getattr(self, "_likelihood_object", value)
        self._check_likelihood(value)
        self._likelihood_object = value
        if value.identity == before.identity:
            return
        try:
            self.sigma_noise = self.sigma_noise
            self.logit_temperature = self.logit_temperature
        except ValueError:
            self._likelihood_object = before
            raise
        if self._backend is not None:
            self._backend.likelihood = value  # of whoever holds it; what it was made with may depend on the old one
        self._backend = None

    def _check_likelihood(self, value: BaseLikelihood) -> None:
        """Posteriors that do not take every likelihood, or no other one any more, refuse it here."""

    @property
    def mean(self) -> Tensor | None:
        """MAP estimate ``(parameters,)`` after ``fit``, the prior's mean before; None while a last layer is not known."""
        if self._mean is None and self.params:
            return self._prior_mean_vector()
        return self._mean

    @mean.setter
    def mean(self, value: Tensor) -> None:
        self._mean = value

    @property
    def _n_inferred(self) -> int:
        """Number of parameters that have a distribution."""
        return self._prior_sizes[PriorStructure.DIAG]

    def _inferred(self, value: Tensor) -> Tensor:
        """The entries of parameter vectors that have a distribution."""
        return value

    @property
    def _mean_inferred(self) -> Tensor:
        """MAP estimate of the parameters that have a distribution; subnetworks keep the others fixed."""
        return self.mean

    @property
    def _H_factor(self) -> Tensor:
        """Scale of the summed curvature: ``1 / (σ² · temperature)``."""
        return 1 / self.sigma_noise.square() / self.temperature

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood of the training data at the MAP in float64, differentiable in ``sigma_noise``."""
        self._check_fitted()
        noise = self.sigma_noise.double()
        factor = -1 / noise.square() / self.temperature
        loss = torch.as_tensor(self.loss, dtype=torch.float64, device=self._device)
        return factor * loss + self.likelihood_object.noise_constant(self.n_data, self.n_outputs, noise)

    def _largest_curvature(self) -> float:
        """A bound on the curvature in any direction, to which a prior precision is added; infinity where none is known."""
        return math.inf

    def _glm_variance(self, capture: Any, prior_precisions: list[Tensor], diagonal: bool) -> Tensor:
        """Predictive variances of one batch for several prior precisions; see :mod:`laplace.capture.variance`."""
        raise NotImplementedError

    def _grid_variance(self, capture: Any, values: Sequence[float]) -> Tensor:
        """Variances of the outputs for many scalar prior precisions, within :data:`laplace.interpolation.ERROR`."""
        between = interpolation_for(values, self._largest_curvature())
        known = values if between is None else between.nodes
        priors = [torch.tensor([value], dtype=self._dtype, device=self._device) for value in known]
        variances = self._glm_variance(capture, priors, True)
        return variances if between is None else between.at(variances, values)

    def _check_fitted(self) -> None:
        raise NotImplementedError

    # --- what every approximation does ---------------------------------------------------------------------------

    def fit(self, train_loader: DataLoader) -> None:
        """Add up curvature over a data loader.

        Args:
            train_loader: Batches ``(x, y)``, or dict-like batches that hold ``dict_key_y``.

        Raises:
            ValueError: If the data do not fit the model and the likelihood.
        """
        raise NotImplementedError

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """Laplace approximation of the evidence.

        Args:
            prior_precision: A new prior precision, which is kept; the posterior's own if None.
            sigma_noise: A new observation noise, likewise.

        Returns:
            A scalar in float64, differentiable in both.

        Raises:
            NotFittedError: Before ``fit``.
        """
        raise NotImplementedError

    def __call__(self, x: Any, pred_type: PredType | str = PredType.GLM, **kwargs: Any) -> Any:
        """Posterior predictive.

        Args:
            x: Inputs ``(batch, …)`` or a dict-like batch.
            pred_type: Which predictive.
            **kwargs: See :func:`laplace.predictive.predict`.

        Raises:
            NotFittedError: Before ``fit``.
            ValueError: If this posterior or its likelihood has no such predictive.
        """
        raise NotImplementedError

    def predictive(
        self,
        x: Tensor | MutableMapping[str, Any],
        pred_type: PredType | str,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same as calling the object, with ``x``, ``pred_type``, ``link_approx`` and ``n_samples`` by position.

        See :func:`laplace.predictive.predict`.
        """
        return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples, **kwargs)

    optimize_prior_precision = tuning.optimize_prior_precision
    optimize_logit_temperature = optimize_logit_temperature
