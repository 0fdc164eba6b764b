"""How scores on fresh examples differ from those on a reference, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace.likelihoods.comparison import calibration_gaps

_ENTRIES = 2**24  # of counts that are drawn at once


@dataclass(frozen=True)
class Change:
    """A figure before and now.

    Attributes:
        before: On the reference.
        now: On the fresh examples.
        change: Now minus before.
        low: Lower end of the change's interval.
        high: Upper end.
    """

    before: float
    now: float
    change: float
    low: float
    high: float


def changes(
    reference: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    bins: int = 15,
) -> dict[str, Change]:
    r"""Compare the scores of one set of predictions on two samples by the percentile bootstrap over the examples of each.

    Args:
        reference: Scores per example by name, as of `likelihoods.scores`: `nll`; with `confidence` and `correct` also the
            accuracy and the expected calibration error.
        fresh: The same of the fresh examples.
        draws: Of the bootstrap.
        level: One-sided level of each end.
        seed: Of the draws.
        bins: Of the calibration error.

    Returns:
        The changes by name: `nll`, and where there are confidences `accuracy` and `ece`.

    Raises:
        ValueError: One of the two has no example.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
    """
    if not len(reference["nll"]) or not len(fresh["nll"]):
        raise ValueError("There is nothing to compare: the reference or the fresh data have no example.")
    generator = torch.Generator().manual_seed(seed)
    before, now = (_drawn(scores, draws, bins, generator) for scores in (reference, fresh))
    ends = torch.tensor([1 - level, level], dtype=torch.float64)
    found = {}
    for name, (value, sample) in now.items():
        old, old_sample = before[name]
        low, high = (sample - old_sample).quantile(ends).tolist()
        found[name] = Change(old, value, value - old, low, high)
    return found


def _drawn(
    scores: Mapping[str, Tensor], draws: int, bins: int, generator: torch.Generator
) -> dict[str, tuple[float, Tensor]]:
    """Return every figure, and its values in the draws, of one sample."""
    n = len(scores["nll"])
    columns = {"nll": scores["nll"].double()[:, None]}
    if "confidence" in scores:
        columns |= {"accuracy": scores["correct"].double()[:, None], "ece": calibration_gaps(scores, bins)}
    drawn: dict[str, list[Tensor]] = {name: [] for name in columns}
    for size in torch.ones(draws).split(max(1, _ENTRIES // n)):
        picked = torch.randint(n, (len(size), n), generator=generator)
        one = torch.ones(1, dtype=torch.float64).expand(picked.shape)
        counts = torch.zeros(len(size), n, dtype=torch.float64).scatter_add_(1, picked, one)
        for name, column in columns.items():
            drawn[name].append(_figure(counts @ column, n))
    whole = {name: float(_figure(column.sum(0, keepdim=True), n)) for name, column in columns.items()}
    return {name: (whole[name], torch.cat(drawn[name])) for name in columns}


def _figure(sums: Tensor, n: int) -> Tensor:
    return (sums[:, 0] if sums.shape[1] == 1 else sums.abs().sum(1)) / n
