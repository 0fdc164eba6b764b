r"""Integrals of a softmax against a Gaussian over logits, as log-probabilities, and draws from that Gaussian.

By samples, by MacKay's probit approximation ("The evidence framework applied to classification networks", Neural
Computation 1992), or by the Laplace bridge (Hobbhahn et al., "Fast predictive uncertainty for classification with Bayesian
deep networks", UAI 2022). Logarithms, so that the negative log likelihood of a sure and wrong prediction does not underflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laplace.enums import LinkApprox


def variances_of(variance: Tensor) -> Tensor:
    """Variances ``(batch, outputs)`` from these or from covariances ``(batch, outputs, outputs)``."""
    return variance if variance.ndim == 2 else variance.diagonal(dim1=1, dim2=2)


def probit_scale(variance: Tensor) -> Tensor:
    r"""The factor :math:`(1 + \tfrac\pi8 \sigma^2)^{-1/2}` on a logit of variance :math:`\sigma^2`."""
    return (1 + torch.pi / 8 * variance).rsqrt()


def log_mean(log_values: Tensor) -> Tensor:
    """Logarithm of the mean over the first dimension, from logarithms."""
    return log_values.logsumexp(0) - math.log(len(log_values))


def softmax_link(
    f: Tensor, variance: Tensor, link_approx: LinkApprox, n_samples: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Log-probabilities of classes from a Gaussian over logits.

    Args:
        f: Means ``(batch, …, classes)``.
        variance: ``(batch, outputs)`` variances or ``(batch, outputs, outputs)`` covariances over the flattened outputs.
        link_approx: How to integrate.
        n_samples: Number of samples for ``'mc'``.
        generator: Source of the samples.

    Raises:
        ValueError: If the bridge is to map logits at several positions.
    """
    f = f.to(variance.dtype)
    if link_approx is LinkApprox.PROBIT:
        return (probit_scale(variances_of(variance).reshape(f.shape)) * f).log_softmax(-1)
    if link_approx is LinkApprox.MC:
        return log_mean(output_samples(f, variance, n_samples, generator).log_softmax(-1))
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


def output_samples(f: Tensor, variance: Tensor, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws ``(n_samples, batch, …, outputs)`` of outputs with variances or covariances over their flattened values."""
    return gaussian_samples(f.flatten(1), variance, n_samples, generator).reshape(n_samples, *f.shape)


def gaussian_samples(
    mean: Tensor, variance: Tensor, n_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from Gaussians.

    Args:
        mean: Means ``(batch, outputs)``.
        variance: Variances ``(batch, outputs)``, or covariances ``(batch, outputs, outputs)``.
        n_samples: Number of draws.
        generator: Source of the draws; torch's global one if None.

    Returns:
        Draws ``(n_samples, batch, outputs)``.
    """
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
