"""Per-example scores of predictions, and their summaries.

Scores of shards are concatenated in order and summarised once, so that a summary does not depend on how the data was split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_Z90 = 1.6448536269514722  # 95 % quantile of the standard normal: a central 90 % interval


def classification_scores(probs: Tensor, y: Tensor, log_probs: Tensor | None = None) -> dict[str, Tensor]:
    """Scores of class probabilities, each ``(terms,)`` float64.

    Args:
        probs: ``(batch, …, classes)``.
        y: Labels ``(batch, …)``.
        log_probs: Their logarithms, from ``la(x, log_probs=True)``: where probabilities underflow, the ``nll`` needs them.

    Returns:
        ``confidence`` (largest probability), ``correct`` (0 or 1), ``nll`` (nats), ``brier`` (summed over classes; Brier,
        "Verification of forecasts expressed in terms of probability", 1950).
    """
    probs = probs.detach().double().reshape(-1, probs.shape[-1])
    if log_probs is None:
        log_probs = probs.clamp(min=torch.finfo(torch.float64).tiny).log()
    return _scores(probs, log_probs.detach().double().reshape(probs.shape), y)


def log_probability_scores(log_probs: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The scores of :func:`classification_scores` from log-probabilities, so that the NLL has no upper end."""
    log_probs = log_probs.detach().double().reshape(-1, log_probs.shape[-1])
    return _scores(log_probs.exp(), log_probs, y)


def _scores(probs: Tensor, log_probs: Tensor, y: Tensor) -> dict[str, Tensor]:
    y = y.reshape(-1).long().to(probs.device)
    picked, nll = (values.gather(1, y[:, None])[:, 0] for values in (probs, -log_probs))
    confidence, label = probs.max(1)
    brier = probs.square().sum(1) - 2 * picked + 1
    return {"confidence": confidence, "correct": (label == y).double(), "nll": nll, "brier": brier}


def regression_scores(mean: Tensor, variance: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Scores of Gaussian predictions, each ``(batch,)`` float64 and averaged over outputs.

    Args:
        mean: ``(batch, outputs)``.
        variance: Variances of the target (including observation noise), ``(batch, outputs)``.
        y: Targets ``(batch, outputs)``.

    Returns:
        ``nll`` (nats), ``squared_error``, ``covered_90`` (inside the central 90 % interval).
    """
    mean, variance, y = (t.detach().double().reshape(len(t), -1) for t in (mean, variance, y))
    error = (y - mean).square()
    nll = 0.5 * (error / variance + variance.log() + math.log(2 * math.pi))
    covered = (error.sqrt() <= _Z90 * variance.sqrt()).double()
    return {"nll": nll.mean(1), "squared_error": error.mean(1), "covered_90": covered.mean(1)}


def regression_details(mean: Tensor, variance: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The Gaussian predictions themselves beside their targets, for calibration curves and residuals.

    Args:
        mean: ``(batch, outputs)``.
        variance: Variances of the target (including observation noise), ``(batch, outputs)``.
        y: Targets ``(batch, outputs)``.

    Returns:
        ``mean``, ``deviation`` (standard deviation of the target) and ``target``, each ``(batch, outputs)`` float64.
    """
    found = {"mean": mean, "deviation": variance.sqrt(), "target": y}
    return {name: values.detach().double().reshape(len(values), -1) for name, values in found.items()}


def gaussian_entropy(mean: Tensor, variance: Tensor, sigma_noise: float = 0.0) -> Tensor:
    r"""Entropies :math:`\tfrac12 \log 2\pi e (v + \sigma^2)` averaged over outputs, ``(batch,)`` float64.

    Args:
        mean: ``(batch, outputs)``.
        variance: Variances ``(batch, outputs)``, or covariances ``(batch, outputs, outputs)`` of which the diagonal counts.
        sigma_noise: Standard deviation of the observation noise.
    """
    variance = variance.detach().double()
    variance = variance.diagonal(dim1=-2, dim2=-1) if variance.ndim > mean.ndim else variance
    return 0.5 * (2 * math.pi * math.e * (variance + sigma_noise**2)).log().reshape(len(mean), -1).mean(1)


def summarize_classification(
    scores: Mapping[str, Tensor], ood_confidence: Mapping[str, Tensor] | None = None, bins: int = 15
) -> dict[str, float]:
    """Accuracy, NLL, Brier score, expected calibration error, and AUROC against out-of-distribution sets.

    The calibration error has equally wide bins of confidence (Naeini et al., AAAI 2015); the AUROC separates in- from
    out-of-distribution examples by confidence.

    Args:
        scores: Those of :func:`classification_scores` over a whole data set.
        ood_confidence: Confidences ``(terms,)`` on out-of-distribution sets, by name.
        bins: Number of bins of the calibration error.
    """
    result = {
        "accuracy": scores["correct"].mean().item(),
        "nll": scores["nll"].mean().item(),
        "brier": scores["brier"].mean().item(),
        "ece": calibration_error(scores["confidence"], scores["correct"], bins),
    }
    for name, outside in (ood_confidence or {}).items():
        result[f"ood_auroc/{name}"] = auroc(scores["confidence"], outside)
    return result


def calibration_error(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """Expected calibration error of examples, each argument ``(examples,)``; the left edge belongs to a bin."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = torch.bucketize(confidence.double(), edges, right=True).clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct.double() - confidence.double())
    return gaps.abs().sum().item() / len(confidence)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an example of the one has more than one of the other, ties counted half (Mann and Whitney)."""
    ordered = outside.sort().values
    below, up_to = (torch.searchsorted(ordered, inside, right=right) for right in (False, True))
    return (below + up_to).double().mean().item() / (2 * len(outside))


def summarize_regression(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """NLL, root mean squared error, and the share of targets inside the central 90 % interval.

    Args:
        scores: Those of :func:`regression_scores` over a whole data set.
    """
    return {
        "nll": scores["nll"].mean().item(),
        "rmse": scores["squared_error"].mean().sqrt().item(),
        "coverage_90": scores["covered_90"].mean().item(),
    }


def get_nll(out_dist: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log likelihood in nats.

    Args:
        out_dist: Class probabilities ``(batch, classes)``.
        targets: Labels ``(batch,)``.
    """
    return nn.functional.nll_loss(out_dist.log(), targets)
