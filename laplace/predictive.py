r"""Posterior predictives: the linearised network's Gaussian over outputs, its links, and sampled networks.

The GLM predictive linearises the network at the MAP, :math:`f(x) \sim \mathcal N(f_{\mathrm{MAP}}(x), J P^{-1} J^\top)`
(Immer et al., "Improving predictions of Bayesian neural nets via local linearization", AISTATS 2021). Classification then
integrates the softmax against that Gaussian: by samples, by MacKay's probit approximation, or by the Laplace bridge (Hobbhahn
et al., "Fast predictive uncertainty for classification with Bayesian deep networks", UAI 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from laplace.capture.evaluation import eval_mode
from laplace.data.batches import joined
from laplace.enums import Likelihood, LinkApprox, PredType, parse
from laplace.fitted import Fitted
from laplace.noise import check_samples


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
    la._check_fitted()
    la._check_weights()
    la._check_inputs(x)
    check_samples(n_samples)
    pred_type = parse(PredType, pred_type, "pred_type")
    link_approx = parse(LinkApprox, link_approx, "link_approx")
    if model_kwargs:
        raise ValueError(f"Unknown arguments {sorted(model_kwargs)}; the model is called with x alone.")
    check_combination(la, pred_type, link_approx)
    regression = la.likelihood is Likelihood.REGRESSION or (la.likelihood is Likelihood.REWARD_MODELING and not fitting)
    if joint and not regression:
        raise ValueError("joint=True is for regression; class probabilities have no joint Gaussian.")
    if joint and pred_type is PredType.NN:
        raise ValueError("joint=True is the covariance of a Gaussian over all outputs: give it pred_type='glm'.")
    if pred_type is PredType.NN:
        outputs = sampled_outputs(la, x, n_samples, generator)
        return (outputs.mean(0), outputs.var(0)) if regression else _as_asked(log_mean_softmax(outputs), log_probs)
    if joint:
        return _joint(la, x)
    if regression:
        return glm_distribution(la, x, diagonal_output)
    need_covariance = link_approx is not LinkApprox.PROBIT and not diagonal_output
    f, variance = glm_distribution(la, x, diagonal=not need_covariance)
    return _as_asked(log_link(f, variance, link_approx, n_samples, generator), log_probs)


def _as_asked(values: Tensor, log_probs: bool) -> Tensor:
    return values if log_probs else values.exp()


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


def glm_distribution(la: Fitted, x: Any, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """Mean ``(batch, …, outputs)`` and covariance (or variances) of the linearised network's outputs."""
    if la.enable_backprop:
        js, f = la.backend.jacobians(x, enable_backprop=True)
        covariance = la.functional_variance(js)
        return f, covariance.diagonal(dim1=-2, dim2=-1) if diagonal else covariance
    found = []
    for _, inputs in la.backend.parts(x):
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


def log_link(
    f: Tensor, variance: Tensor, link_approx: LinkApprox, n_samples: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Log class probabilities from a Gaussian over logits.

    Their logarithms, not they themselves: a probability of e⁻¹²⁰ is zero in float32, and scores would be those of that zero.

    Args:
        f: Means ``(batch, …, classes)``.
        variance: ``(batch, outputs)`` variances or ``(batch, outputs, outputs)`` covariances over the flattened outputs.
        link_approx: How to integrate.
        n_samples: Number of samples for ``'mc'``.
        generator: Source of the samples.
    """
    f = f.to(variance.dtype)
    diagonal = variance if variance.ndim == 2 else variance.diagonal(dim1=1, dim2=2)
    if link_approx is LinkApprox.PROBIT:
        kappa = (1 + torch.pi / 8 * diagonal.reshape(f.shape)).rsqrt()
        return (kappa * f).log_softmax(-1)
    if link_approx is LinkApprox.MC:
        draws = gaussian_samples(f.flatten(1), variance, n_samples, generator)
        return log_mean_softmax(draws.reshape(n_samples, *f.shape))
    if f.ndim != 2:
        raise ValueError(f"link_approx={link_approx.value!r} needs outputs (batch, classes), got {tuple(f.shape)}.")
    covariance = variance if variance.ndim == 3 else torch.diag_embed(variance)
    return _bridge(f, covariance, normalise=link_approx is LinkApprox.BRIDGE_NORM)


def _bridge(f: Tensor, covariance: Tensor, normalise: bool) -> Tensor:
    """Logarithms of the mean of the Dirichlet that the Laplace bridge maps the Gaussian to, after moving it to zero-sum logits.

    In float64: variance that all logits share cancels, and may be much larger than what is left.
    """
    dtype, f, covariance = f.dtype, f.double(), covariance.double()
    total = covariance.sum((1, 2))
    f = f - covariance.sum(-1) * (f.sum(-1) / total)[:, None]
    covariance = covariance - covariance.sum(-1)[:, :, None] * covariance.sum(-2)[:, None] / total[:, None, None]
    variance = covariance.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(f.dtype).tiny)
    classes = f.shape[-1]
    if normalise:
        scale = variance.mean(1, keepdim=True) / (classes / 2) ** 0.5
        f, variance = f / scale.sqrt(), variance / scale
    log_bracket = torch.logaddexp(
        torch.full_like(f, 1 - 2 / classes).clamp(min=0).log(),
        f + torch.logsumexp(-f, 1, keepdim=True) - 2 * math.log(classes),
    )
    return (log_bracket - variance.log()).log_softmax(1).to(dtype)


def log_mean_softmax(draws: Tensor) -> Tensor:
    """Logarithm of the mean of the softmax of draws ``(n_samples, …, classes)``."""
    return draws.log_softmax(-1).logsumexp(0) - math.log(len(draws))


def link(
    f: Tensor, variance: Tensor, link_approx: LinkApprox, n_samples: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Class probabilities from a Gaussian over logits; arguments as of :func:`log_link`."""
    return log_link(f, variance, link_approx, n_samples, generator).exp()


def gaussian_samples(
    mean: Tensor, variance: Tensor, n_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws ``(n_samples, batch, outputs)`` from Gaussians with variances or covariances."""
    noise = torch.randn(n_samples, *mean.shape, dtype=variance.dtype, device=mean.device, generator=generator)
    if variance.ndim == 2:
        return mean + noise * variance.sqrt()
    return mean + torch.einsum("boe,sbe->sbo", _root(variance), noise)


def _root(covariance: Tensor) -> Tensor:
    """``R`` with ``R Rᵀ = covariance``, ``(batch, outputs, outputs)``.

    From eigenvectors, which stand singular covariances; but these have no derivative where eigenvalues repeat (as in the
    last layer of a regression), so gradients pass through the Cholesky factor.
    """
    if covariance.requires_grad:
        jitter = 100 * torch.finfo(covariance.dtype).eps * covariance.detach().diagonal(dim1=1, dim2=2)
        return torch.linalg.cholesky(covariance + torch.diag_embed(jitter))
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp(min=0).sqrt()[:, None]).to(covariance.dtype)


def sampled_outputs(la: Fitted, x: Any, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Outputs ``(n_samples, batch, …, outputs)`` of networks drawn from the posterior; the model is left as it is."""
    module, names, inputs = la.model, list(la.backend.named_params), x
    with torch.set_grad_enabled(la.enable_backprop), eval_mode(la.model):
        if la.backend.last_layer:
            _, inputs = la.model.forward_with_features(x)
            module, prefix = la.model.last_layer, f"{la.model.last_layer_name}."
            names = [name.removeprefix(prefix) for name in names]
        outputs = []
        for vector in la.sample(n_samples, generator):
            parts = vector.to(la.params[0].dtype).split([p.numel() for p in la.params])
            weights = {n: part.view_as(p) for n, part, p in zip(names, parts, la.params, strict=True)}
            outputs.append(torch.func.functional_call(module, weights, (inputs,)))
    return torch.stack(outputs)


def function_samples(
    la: Fitted,
    x: Any,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws of the network's outputs under the posterior, ``(n_samples, batch, …, outputs)``.

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
    return gaussian_samples(f.flatten(1), variance, n_samples, generator).reshape(n_samples, *f.shape)


def samples(
    la: Fitted,
    x: Any,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws from the predictive: probabilities, or outputs for regression; arguments as of :func:`function_samples`."""
    draws = function_samples(la, x, pred_type, n_samples, diagonal_output, generator)
    return draws.softmax(-1) if la.likelihood is Likelihood.CLASSIFICATION else draws
