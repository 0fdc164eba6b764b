r"""Laplace approximations :math:`\mathcal N(\theta_{\mathrm{MAP}}, P^{-1})` over weights: evidence, predictive, state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from laplace import evidence, predictive, state
from laplace.enums import PredType
from laplace.posterior.summed import SummedLaplace
from laplace.prior import log_det, weighted_sum
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums


class ParametricLaplace(SummedLaplace):
    """Base of the structures full, kron and diag; each adds how its sums become a precision, and that precision's algebra.

    Attributes:
        mean: MAP estimate ``(parameters,)``; the prior's mean before ``fit``.
        H: Curvature of the summed loss in the structure's own form; zero before ``fit``, None while a last layer is not known.
        loss: Summed loss at the MAP.
        n_data: Number of examples that were added up.
        input_ndim: Number of dimensions of a batch of inputs, if these are tensors and it is known; predictions refuse another.
        sums: The raw sums behind ``H``; what a further ``fit(override=False)`` adds to.
    """

    pred_types = (PredType.GLM, PredType.NN)
    H: Any = None

    # --- what a structure provides -------------------------------------------------------------------------------

    @property
    def posterior_precision(self) -> Any:
        """Posterior precision :math:`P` in the structure's own form."""
        raise NotImplementedError

    @property
    def log_det_posterior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P`."""
        raise NotImplementedError

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`\Delta^\top P \Delta` with :math:`\Delta` = ``value - mean``, per row of ``value``.

        Args:
            value: Parameter vectors ``(…, parameters)``.
        """
        raise NotImplementedError

    def functional_variance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` for every example by itself.

        Args:
            Js: Jacobians ``(batch, outputs, parameters)``.

        Returns:
            Covariances ``(batch, outputs, outputs)``.

        Raises:
            NotFittedError: Before ``fit``.
        """
        raise NotImplementedError

    def functional_covariance(self, Js: Tensor) -> Tensor:
        r""":math:`J P^{-1} J^\top` jointly for all examples.

        Args:
            Js: Jacobians ``(batch · outputs, parameters)``.

        Returns:
            One covariance ``(batch · outputs, batch · outputs)``.

        Raises:
            NotFittedError: Before ``fit``.
        """
        raise NotImplementedError

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Draw parameter vectors from the posterior.

        Args:
            n_samples: Number of draws.
            generator: Source of the draws; torch's global one if None.

        Returns:
            Draws ``(n_samples, parameters)``.

        Raises:
            NotFittedError: Before ``fit``.
        """
        raise NotImplementedError

    # --- evidence ------------------------------------------------------------------------------------------------

    @property
    def scatter(self) -> Tensor:
        r""":math:`(\theta_{\mathrm{MAP}} - \mu_0)^\top P_0 (\theta_{\mathrm{MAP}} - \mu_0)`."""
        delta = self.mean.double() - self.prior_mean.double()
        return weighted_sum(self.prior_precision, delta.square(), self._tensor_sizes)

    @property
    def log_det_prior_precision(self) -> Tensor:
        r"""Log determinant :math:`\log\det P_0`."""
        return log_det(self.prior_precision, self._tensor_sizes)

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`."""
        return self.log_det_posterior_precision - self.log_det_prior_precision

    log_marginal_likelihood = evidence.log_marginal_likelihood

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """Log density of the posterior (before ``fit`` of the prior) at ``value``; without its constant if not ``normalized``.

        Raises:
            NotFittedError: While a last layer is not known.
        """
        if self._mean is None:
            square_norm, log_det = self._prior_square_norm(value), lambda: self.log_det_prior_precision
        else:
            square_norm, log_det = self.square_norm(value), lambda: self.log_det_posterior_precision
        if not normalized:
            return -square_norm / 2
        return (log_det() - square_norm - self._n_inferred * math.log(2 * math.pi)) / 2

    def _prior_square_norm(self, value: Tensor) -> Tensor:
        if not self.params:
            self._check_fitted()
        delta = self._inferred(value).double() - self._mean_inferred.double()
        return (delta.square() * self.prior_precision_diag.double()).sum(-1)

    # --- predictive ----------------------------------------------------------------------------------------------

    __call__ = predictive.predict
    predictive_samples = predictive.samples
    functional_samples = predictive.function_samples
    output_variances = predictive.output_variances
    _glm_predictive_distribution = predictive.glm_predictive_distribution
    _nn_predictive_samples = predictive.nn_predictive_samples

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model, as tensors and plain values; loads with ``weights_only=True``."""
        return state.state_dict(self)

    def _state(self) -> dict[str, Any]:
        """The structure's own part of the state: ``spec`` and what it describes."""
        return {"spec": self.sums.spec.to_json(), "sums": self.sums.to_tensors(), "estimator": self.sums.estimator}

    def _settings(self) -> tuple[str, ...]:
        """Attributes that the structure or the subset adds to the state."""
        return ()

    def _read_state(self, state: dict[str, Any]) -> Any:
        """Check the structure's own part of a state, and prepare it for :meth:`_take_state`."""
        tensors = {name: tensor.to(self._device) for name, tensor in state["sums"].items()}
        sums = CurvatureSums.from_tensors(SumsSpec.from_json(state["spec"]), tensors, state["n_data"])
        sums.estimator = state.get("estimator")
        return sums

    def _take_state(self, content: Any) -> None:
        self.set_sums(content)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`; see :func:`laplace.state.load_state_dict`.

        Args:
            state_dict: What :meth:`state_dict` gave for the same model and class of posterior.

        Raises:
            ValueError: If it is of another posterior; nothing is changed then.
        """
        state.load_state_dict(self, state_dict)
