r"""Posterior predictives: the linearised network's Gaussian over outputs, its links, and sampled networks.

The GLM predictive linearises the network at the MAP, :math:`f(x) \sim \mathcal N(f_{\mathrm{MAP}}(x), J P^{-1} J^\top)`
(Immer et al., "Improving predictions of Bayesian neural nets via local linearization", AISTATS 2021). What becomes of that
Gaussian is the likelihood's to say; the approximations of a softmax are in :mod:`laplace.likelihoods.links`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace.capture.chosen_outputs import ChosenOutputs
from laplace.capture.evaluation import eval_mode
from laplace.capture.forward import failures_named
from laplace.capture.stateless import with_tensors
from laplace.data.batches import joined
from laplace.enums import LinkApprox, PredType, parse
from laplace.fitted import Fitted
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.links import output_samples
from laplace.likelihoods.predictive import Prediction
from laplace.linalg.precision import widened
from laplace.noise import check_samples

_ROUNDED = 0.05  # share of the posterior's variance that the rounding of weights may add without a word


def predict(
    la: Fitted,
    x: Any,
    pred_type: PredType | str = PredType.GLM,
    joint: bool = False,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    fitting: bool = False,
    log_probs: bool = False,
    **model_kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Posterior predictive for one batch.

    Args:
        la: A fitted posterior.
        x: Inputs ``(batch, …)`` or a dict-like batch.
        pred_type: ``'glm'`` or ``'nn'``; functional (GP) posteriors take ``'gp'`` alone.
        joint: Regression only: one covariance over all examples and outputs of the batch, whatever ``diagonal_output`` says.
        link_approx: ``'probit'``, ``'mc'``, ``'bridge'`` or ``'bridge_norm'``; ``'nn'`` takes ``'mc'`` only.
        n_samples: Number of samples, where samples are drawn.
        diagonal_output: Ignore covariances between outputs.
        generator: Source of the samples.
        fitting: Reward models only: predict as the classifier that was fitted.
        log_probs: Return the logarithms of class probabilities, finite where probabilities underflow.
        **model_kwargs: Refused; the model is called with ``x`` alone.

    Returns:
        Class probabilities ``(batch, …, classes)``; or for regression the mean ``(batch, outputs)`` and the covariance
        ``(batch, outputs, outputs)`` of the outputs without observation noise (variances ``(batch, outputs)`` if
        ``diagonal_output`` or for ``'nn'``; ``(batch · outputs, batch · outputs)`` if ``joint``).

    Raises:
        NotFittedError: Before ``fit``.
        ValueError: On an unknown or impossible combination of arguments.
    """
    if model_kwargs:
        raise ValueError(f"Unknown arguments {sorted(model_kwargs)}; the model is called with x alone.")
    pred_type, link_approx = _checked(la, x, pred_type, link_approx, n_samples)
    law = la.likelihood_object.predicting(fitting)
    if joint and not law.predicts_outputs:
        raise ValueError("joint=True is for regression; class probabilities have no joint Gaussian.")
    if joint and pred_type is PredType.NN:
        raise ValueError("joint=True is the covariance of a Gaussian over all outputs: give it pred_type='glm'.")
    if joint:
        return _joint(la, x)
    found = _prediction(la, law, x, pred_type, link_approx, n_samples, diagonal_output, generator)
    return law.log_public(found) if log_probs else law.public(found)


def _checked(
    la: Fitted, x: Any, pred_type: PredType | str, link_approx: LinkApprox | str, n_samples: int
) -> tuple[PredType, LinkApprox]:
    """Refuse what cannot be predicted, and weights that are not those of the fit; returns the choices as enumerations."""
    la._check_fitted()
    la._check_weights()
    la._check_inputs(x)
    check_samples(n_samples)
    pred_type = parse(PredType, pred_type, "pred_type")
    link_approx = parse(LinkApprox, link_approx, "link_approx")
    check_combination(la, pred_type, link_approx)
    return pred_type, link_approx


def prediction(
    la: Fitted,
    law: BaseLikelihood,
    x: Any,
    pred_type: PredType | str,
    link_approx: LinkApprox | str,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Prediction:
    """The predictive as a likelihood keeps it, for its scores; arguments and errors as of :func:`predict`."""
    pred_type, link_approx = _checked(la, x, pred_type, link_approx, n_samples)
    return _prediction(la, law, x, pred_type, link_approx, n_samples, diagonal_output, generator)


def _prediction(la, law, x, pred_type, link_approx, n_samples, diagonal_output, generator) -> Prediction:
    scale = la.logit_temperature if law.scales_logits else 1.0
    if pred_type is PredType.NN:
        return law.of_networks(widened(sampled_outputs(la, x, n_samples, generator)) / scale)
    f, variance = glm_distribution(la, x, diagonal_output or law.diagonal_suffices(link_approx))
    if scale != 1:
        f, variance = f / scale, variance / scale**2
    return law.integrate(f, variance, link_approx, n_samples, generator)


def check_combination(la: Fitted, pred_type: PredType, link_approx: LinkApprox) -> None:
    """Raise ValueError for predictives that do not exist."""
    if pred_type not in la.pred_types:
        valid = ("is " if len(la.pred_types) == 1 else "are ") + " and ".join(repr(t.value) for t in la.pred_types)
        owner = "functional (GP)" if pred_type is PredType.GP else "parametric"
        raise ValueError(f"pred_type={pred_type.value!r} belongs to {owner} posteriors; valid here {valid}.")
    if pred_type is PredType.NN and link_approx is not LinkApprox.MC:
        raise ValueError(
            f"pred_type='nn' samples networks, so only link_approx='mc' is possible, not {link_approx.value!r}."
        )


def output_variances(la: Fitted, x: Any, outputs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of some of the linearised network's outputs, in a backward pass for each of them.

    Args:
        la: A fitted posterior.
        x: Inputs ``(batch, …)`` or a dict-like batch.
        outputs: Indices in the flattened outputs of an example.

    Returns:
        Both ``(batch, chosen)``, whatever the likelihood: of logits, where outputs are logits.

    Raises:
        NotFittedError: Before ``fit``.
        ValueError: If an index is out of range or given twice, or the posterior is a functional (GP) one.
    """
    la._check_fitted()
    la._check_weights()
    la._check_inputs(x)
    if PredType.GP in la.pred_types:
        raise ValueError(
            "output_variances is of parametric posteriors; a functional (GP) one gives all its outputs at once."
        )
    if la.enable_backprop:
        chosen = list(outputs)
        f, variance = glm_distribution(la, x, diagonal=True)
        return f.flatten(1)[:, chosen], variance[:, chosen]
    found = []
    with eval_mode(la.backend.model):
        for _, inputs in la.backend.parts(x, outputs=len(outputs)):
            capture = ChosenOutputs(la.backend.capture(inputs), outputs)
            found.append((capture.f, la._glm_variance(capture, [la.prior_precision], True)[0].detach()))
    f, variance = joined(found)
    return f, variance


def glm_distribution(la: Fitted, x: Any, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """Mean ``(batch, …, outputs)`` and covariance (or variances) of the linearised network's outputs."""
    if la.enable_backprop:
        js, f = la.backend.jacobians(x, enable_backprop=True)
        covariance = la.functional_variance(js)
        return f, covariance.diagonal(dim1=-2, dim2=-1) if diagonal else covariance
    found = []
    with eval_mode(la.backend.model):
        for _, inputs in la.backend.parts(x, every_output=True):
            capture = la.backend.capture(inputs)
            found.append((capture.f, la._glm_variance(capture, [la.prior_precision], diagonal)[0].detach()))
    f, variance = joined(found)
    return f, variance


def glm_predictive_distribution(
    la: Fitted, X: Any, joint: bool = False, diagonal_output: bool = False
) -> tuple[Tensor, Tensor]:
    """The Gaussian over the linearised network's outputs, whatever the likelihood; a name that public scripts call.

    Args:
        la: A fitted posterior.
        X: Inputs ``(batch, …)`` or a dict-like batch.
        joint: One covariance over all examples and outputs.
        diagonal_output: Variances instead of covariances between outputs; without effect on a joint one.
    """
    la._check_fitted()
    la._check_weights()
    la._check_inputs(X)
    return _joint(la, X) if joint else glm_distribution(la, X, diagonal_output)


def nn_predictive_samples(la: Fitted, X: Any, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """Draws from the predictive of sampled networks, as :func:`samples` with ``'nn'``; a name that public scripts call."""
    return samples(la, X, PredType.NN, n_samples, generator=generator)


def _joint(la: Fitted, x: Any) -> tuple[Tensor, Tensor]:
    js, f = la.backend.jacobians(x, enable_backprop=la.enable_backprop)
    covariance = la.functional_covariance(js.flatten(0, 1))
    return f.flatten(), covariance if la.enable_backprop else covariance.detach()


@torch.no_grad()
def map_outputs(la: Fitted, x: Any) -> Tensor:
    """Outputs ``(batch, …, outputs)`` of the network itself."""
    with eval_mode(la.model):
        return widened(la.model(x))


def sampled_outputs(la: Fitted, x: Any, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Outputs ``(n_samples, batch, …, outputs)`` of networks drawn from the posterior; the model is left as it is."""
    module, names, inputs = la.model, list(la.backend.named_params), x
    named = failures_named(la.model, x, "this batch")
    with torch.set_grad_enabled(la.enable_backprop), eval_mode(la.model), named:
        if la.backend.last_layer:
            _, inputs = la.model.forward_with_features(x)
            module, prefix = la.model.last_layer, f"{la.model.last_layer_name}."
            names = [name.removeprefix(prefix) for name in names]
        outputs = []
        vectors = la.sample(n_samples, generator)
        _warn_of_rounding(la, vectors)
        for vector in vectors:
            weights = dict(zip(names, _as_weights(la, vector), strict=True))
            outputs.append(with_tensors(module, weights, inputs))
    return torch.stack(outputs)


def _as_weights(la: Fitted, vector: Tensor) -> list[Tensor]:
    """The tensors of a parameter vector, each of its parameter's shape and type."""
    parts = vector.split([p.numel() for p in la.params])
    return [part.view_as(p).to(p.dtype) for part, p in zip(parts, la.params, strict=True)]


def _warn_of_rounding(la: Fitted, vectors: Tensor) -> None:
    """Say so where weights in half precision cannot hold the differences between samples."""
    kind = min((p.dtype for p in la.params), key=lambda dtype: -torch.finfo(dtype).eps)
    rounded = (torch.cat([part.flatten().to(vectors) for part in _as_weights(la, vector)]) for vector in vectors)
    rounding = sum((vector - other).square().sum() for vector, other in zip(vectors, rounded, strict=True))
    weights = torch.cat([p.detach().flatten() for p in la.params])
    spread = (vectors - weights.to(vectors)).square().sum()
    if rounding > _ROUNDED * spread:
        warnings.warn(
            f"Samples of the weights are rounded to {str(kind).removeprefix('torch.')}, whose spacing adds "
            f"{100 * float(rounding / spread):.0f}% to the variance of their posterior. Take pred_type='glm', whose variances "
            "are in float32, or fit model.float().",
            stacklevel=3,
        )


def function_samples(
    la: Fitted,
    x: Any,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws of the network's outputs under the posterior, ``(n_samples, batch, …, outputs)``; ``logit_temperature`` is no part.

    Args:
        la: A fitted posterior.
        x: Inputs ``(batch, …)`` or a dict-like batch.
        pred_type: ``'glm'`` draws from the Gaussian over outputs, ``'nn'`` runs networks drawn from the posterior.
        n_samples: Number of draws.
        diagonal_output: Ignore covariances between outputs, where these are Gaussian.
        generator: Source of the draws.
    """
    la._check_fitted()
    la._check_weights()
    la._check_inputs(x)
    check_samples(n_samples)
    pred_type = parse(PredType, pred_type, "pred_type")
    check_combination(la, pred_type, LinkApprox.MC)
    if pred_type is PredType.NN:
        return sampled_outputs(la, x, n_samples, generator)
    f, variance = glm_distribution(la, x, diagonal_output)
    return output_samples(f, variance, n_samples, generator)


def samples(
    la: Fitted,
    x: Any,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws of the target's mean: probabilities, or outputs for regression, ``(n_samples, batch, …, outputs)``.

    Args:
        la: A fitted posterior.
        x: Inputs ``(batch, …)`` or a dict-like batch.
        pred_type: As of :func:`function_samples`.
        n_samples: Number of draws.
        diagonal_output: Ignore covariances between outputs, where these are Gaussian.
        generator: Source of the draws.
    """
    draws = function_samples(la, x, pred_type, n_samples, diagonal_output, generator)
    return la.likelihood_object.mean(draws / la.logit_temperature)
