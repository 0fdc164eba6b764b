"""Whether one set of predictions is worse than another on the same examples: paired bootstrap of the scores' differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES = 2**24  # of counts that are drawn at once


@dataclass(frozen=True)
class Difference:
    """A score of the one minus that of the other; positive if the one is worse.

    Attributes:
        value: On the examples.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


def not_worse(differences: Mapping[str, Difference], tolerance: float = 0.0) -> bool:
    """Whether no score of the one is shown to be worse: of none does the whole interval lie above the tolerance."""
    return all(difference.low <= tolerance for difference in differences.values())


def paired_differences(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    bins: int = 15,
) -> dict[str, Difference]:
    r"""Compare scores on the same examples by the percentile bootstrap over examples.

    Each draw takes $n$ of the $n$ examples with replacement, the same ones for both. Of the mean negative log likelihood and,
    for classification, of the expected calibration error
    $\frac1n\sum_b|\sum_{i\in b}(\mathrm{correct}_i-\mathrm{confidence}_i)|$ with equally wide bins.

    Args:
        one: Scores per example by name: `nll`, and for classification `confidence` and `correct`, as
            `likelihoods.scores.classification_scores` gives them.
        other: The same of the other predictions.
        draws: Of the bootstrap.
        level: One-sided level of each end: 0.95 makes an interval of 90 %.
        seed: Of the draws.
        bins: Of the calibration error.

    Returns:
        The differences by name: `nll`, and for classification `ece`.

    Raises:
        ValueError: The scores are not of the same number of examples, or there are none.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 13.
    """
    n = len(one["nll"])
    if n == 0 or n != len(other["nll"]):
        raise ValueError(
            f"The scores are of {n} and {len(other['nll'])} examples; expected the same ones, at least one."
        )
    columns = {"nll": (one["nll"] - other["nll"]).double()[:, None]}
    if "confidence" in one:
        columns["ece"] = torch.cat([calibration_gaps(one, bins), calibration_gaps(other, bins)], 1)
    generator = torch.Generator().manual_seed(seed)
    values = {name: _statistic(name, column.sum(0, keepdim=True), n) for name, column in columns.items()}
    drawn: dict[str, list[Tensor]] = {name: [] for name in columns}
    for size in torch.full((draws,), 1).split(max(1, _ENTRIES // n)):
        picked = torch.randint(n, (len(size), n), generator=generator)
        counts = torch.zeros(len(size), n, dtype=torch.float64).scatter_add_(
            1, picked, torch.ones(1, dtype=torch.float64).expand(picked.shape)
        )
        for name, column in columns.items():
            drawn[name].append(_statistic(name, counts @ column, n))
    ends = torch.tensor([1 - level, level], dtype=torch.float64)
    found = {name: torch.cat(parts).quantile(ends).tolist() for name, parts in drawn.items()}
    return {name: Difference(float(values[name]), *found[name]) for name in columns}


def calibration_gaps(scores: Mapping[str, Tensor], bins: int) -> Tensor:
    """Return what each example adds to the gap between accuracy and confidence of its bin, `(examples, bins)`."""
    confidence = scores["confidence"].double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1  # the right edge belongs to a bin
    gap = scores["correct"].double() - confidence
    return torch.zeros(len(gap), bins, dtype=torch.float64).scatter_(1, which[:, None], gap[:, None])


def _statistic(name: str, sums: Tensor, n: int) -> Tensor:
    """Return the difference of each row of sums."""
    if name == "nll":
        return sums[:, 0] / n
    one, other = sums.abs().chunk(2, 1)
    return (one.sum(1) - other.sum(1)) / n
