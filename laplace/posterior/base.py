"""What every Laplace approximation has: a model, a likelihood, a Gaussian prior, a backend."""

from __future__ import annotations

from collections.abc import MutableMapping
from math import inf
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
from laplace.enums import Likelihood, LinkApprox, PredType, PriorStructure, parse
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.named import NamedLikelihood
from laplace.posterior.arguments import ORDER, by_name, check_model, signature
from laplace.prior import as_value, spread
from laplace.temperature import optimize_logit_temperature


class BaseLaplace:
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
    _logit_temperature = 1.0  # objects that were pickled before there was one have none of their own

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
    def prior_precision(self) -> Tensor:
        """Precision of the prior: ``(1,)``, one per parameter tensor, or one per parameter."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        value = as_value("prior_precision", value, self._dtype, self._device)
        value = value.reshape(1) if value.ndim == 0 else value
        if self.params and (value.ndim != 1 or len(value) not in self._prior_sizes.values()):
            kinds = {PriorStructure.LAYERWISE: "(one per parameter tensor)", PriorStructure.DIAG: "(one per parameter)"}
            valid = [f"{size} values {kinds[kind]}" for kind, size in self._prior_sizes.items() if kind in kinds]
            raise ValueError(
                f"prior_precision has shape {tuple(value.shape)}; valid are a scalar, {' or '.join(valid)}."
            )
        if not bool((value > 0).all() & torch.isfinite(value).all()):
            wrong = value[~((value > 0) & torch.isfinite(value))][0]
            raise ValueError(f"prior_precision must be positive and finite, but holds {wrong.item()}.")
        if self.params:
            self._check_prior_structure(value)
        else:
            self._prior_precision_argument = value
        self._prior_precision = value
        self._prior_changed()

    @property
    def _prior_sizes(self) -> dict[PriorStructure, int]:
        """Number of values of the prior precision by structure."""
        return {PriorStructure.SCALAR: 1, PriorStructure.LAYERWISE: self.n_layers, PriorStructure.DIAG: self.n_params}

    @property
    def mean(self) -> Tensor | None:
        """MAP estimate ``(parameters,)`` after ``fit``, the prior's mean before; None while a last layer is not known."""
        if self._mean is None and self.params:
            return self._prior_mean_vector()
        return self._mean

    @mean.setter
    def mean(self, value: Tensor) -> None:
        self._mean = value

    def _prior_mean_vector(self) -> Tensor:
        """Mean of the prior, one value per parameter."""
        return self.prior_mean.expand(self.n_params)

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

    def _check_prior_structure(self, value: Tensor) -> None:
        """Structures that do not take every prior refuse it here."""

    def _prior_changed(self) -> None:
        """Structures that cache what depends on the prior drop it here."""

    @property
    def prior_mean(self) -> Tensor:
        """Mean of the prior: a scalar or one value per parameter."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        value = as_value("prior_mean", value, self._dtype, self._device)
        sizes = {self.n_params, self._prior_sizes[PriorStructure.DIAG]} if self.params else set()
        if self.params and (value.ndim > 1 or value.numel() not in {1, *sizes}):
            valid = " or ".join(f"({size},)" for size in sorted(sizes))
            raise ValueError(f"prior_mean has shape {tuple(value.shape)}; valid are a scalar or {valid}.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"prior_mean must be finite, but holds {value[~torch.isfinite(value)].flatten()[0].item()}."
            )
        self._prior_mean_argument = value
        self._prior_mean = value

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        value = as_value("sigma_noise", value, self._dtype, self._device)
        if value.numel() != 1:
            values = ", ".join(f"{number:.6g}" for number in value.flatten().tolist())
            raise ValueError(
                f"sigma_noise must be a scalar, but has shape {tuple(value.shape)}. Noises that differ between outputs change "
                "the curvature, so they belong to the likelihood, before the fit: "
                f"likelihood=laplace.likelihoods.GaussianPerOutput([{values}]) in place of 'regression', with sigma_noise=1, "
                "which is then the common factor of these."
            )
        value = value.reshape(())
        if not bool((value > 0) & torch.isfinite(value)):
            raise ValueError(f"sigma_noise must be positive and finite, but is {value.item()}.")
        if not self.likelihood_object.has_noise and float(value.detach()) != 1:
            raise ValueError(
                f"sigma_noise={float(value.detach())} has no meaning for {self.likelihood_object.identity}; it must be 1 "
                "(use temperature to scale the likelihood)."
            )
        self._sigma_noise = value
        self._prior_changed()

    @property
    def temperature(self) -> float:
        """Temperature of the likelihood."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not isinstance(value, (int, float, Tensor)) or not 0 < value < inf:
            raise ValueError(f"temperature={value!r} must be positive and finite.")
        self._temperature = value
        self._prior_changed()

    @property
    def logit_temperature(self) -> float:
        r"""What predictions divide the logits by, :math:`T` of temperature scaling; 1 unless it is set or fitted.

        A predictive is that of the network whose logits are :math:`f / T`: of the mean :math:`f / T` and the covariance
        :math:`\Sigma / T^2` under ``pred_type='glm'``, of every sampled network's :math:`f / T` under ``'nn'`` (Guo et al., "On
        calibration of modern neural networks", ICML 2017, for the predictive). Not to be confused with ``temperature``, the
        temperature of the posterior, which scales the curvature: that changes variances alone, evidence and samples with them;
        this one changes mean and variance of the logits, and neither evidence nor weights. ``optimize_logit_temperature`` and
        the jobs fit it.
        """
        return self._logit_temperature

    @logit_temperature.setter
    def logit_temperature(self, value: float) -> None:
        if not isinstance(value, (int, float, Tensor)) or isinstance(value, bool) or not 0 < value < inf:
            raise ValueError(f"logit_temperature={value!r} must be positive and finite.")
        if value != 1 and not self.likelihood_object.scales_logits:
            raise ValueError(
                f"logit_temperature={float(value)} has no meaning for {self.likelihood_object.identity}, whose outputs are no "
                "logits; it must be 1."
            )
        self._logit_temperature = float(value)

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

    @property
    def prior_precision_diag(self) -> Tensor:
        """Precision of the prior, one value per parameter ``(parameters,)``."""
        return spread(self.prior_precision, [p.numel() for p in self.params])

    def initial_prior_precision(self, value: float | Tensor, structure: PriorStructure | str) -> Tensor:
        """A prior precision of the given structure, filled with ``value`` where that is a scalar."""
        structure = parse(PriorStructure, structure, "prior_structure")
        value = as_value("prior precision", value, self._dtype, self._device)
        if value.numel() > 1:
            return value.clone()
        if structure not in self._prior_sizes:
            valid = ", ".join(repr(kind.value) for kind in self._prior_sizes)
            raise ValueError(
                f"{type(self).__name__} has no {structure.value!r} prior; valid prior_structures are {valid}."
            )
        return value.reshape(1).repeat(self._prior_sizes[structure])

    def _check_fitted(self) -> None:
        raise NotImplementedError

    # --- what every approximation does ---------------------------------------------------------------------------

    def fit(self, train_loader: DataLoader) -> None:
        """Add up curvature over a data loader."""
        raise NotImplementedError

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """Laplace approximation of the evidence."""
        raise NotImplementedError

    def __call__(self, x: Any, pred_type: PredType | str = PredType.GLM, **kwargs: Any) -> Any:
        """Posterior predictive."""
        raise NotImplementedError

    def predictive(
        self,
        x: Tensor | MutableMapping[str, Any],
        pred_type: PredType | str,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same as calling the object; see :func:`laplace.predictive.predict`."""
        return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples, **kwargs)

    optimize_prior_precision = tuning.optimize_prior_precision
    optimize_logit_temperature = optimize_logit_temperature
