"""What may be set of a posterior before its fit and after it: prior, noise and temperatures, each checked when it is set."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from laplace.enums import PriorStructure, parse
from laplace.prior import as_value, spread


class Hyperparameters:
    """The part of a posterior that holds them; its likelihood, parameters, type and device come from the posterior itself."""

    _logit_temperature = 1.0  # objects that were pickled before there was one have none of their own

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
    def prior_precision_diag(self) -> Tensor:
        """Precision of the prior, one value per parameter ``(parameters,)``."""
        return spread(self.prior_precision, self._tensor_sizes)

    @property
    def _tensor_sizes(self) -> list[int]:
        """Number of entries of every tensor that is inferred."""
        return [p.numel() for p in self.params]

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

    def _check_prior_structure(self, value: Tensor) -> None:
        """Structures that do not take every prior refuse it here."""

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

    def _prior_mean_vector(self) -> Tensor:
        """Mean of the prior, one value per parameter."""
        return self.prior_mean.expand(self.n_params)

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

    def _prior_changed(self) -> None:
        """Structures that cache what depends on the prior drop it here."""
