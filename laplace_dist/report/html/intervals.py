"""Bootstrap intervals of the metrics, over examples: every column is drawn alike, so that differences are paired.

The means, the calibration error and the area under the ROC curve are functions of how often each example was drawn, so a draw
is a row of counts and no metric is computed example by example.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 13 (percentile intervals).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from laplace_dist.report.html.columns import Column

DRAWS, FEWEST, BUDGET = 1000, 200, 10**8  # draws, and examples drawn in all before there are fewer of them
LEVEL = 0.95
BINS = 15
_CHUNK = 2**22  # counts at once
_MEANS = {"accuracy": "correct", "coverage_90": "covered_90"}
Statistic = Callable[[np.ndarray], np.ndarray]


def draws_of(n: int) -> int:
    """Return how many draws are affordable for so many examples."""
    return int(min(DRAWS, max(FEWEST, BUDGET // max(n, 1))))


def distributions(columns: Sequence[Column], metrics: Sequence[str], seed: int) -> dict[str, list[np.ndarray | None]]:
    """Return the bootstrap distribution of each metric for each column; None where the metric is not known here.

    Args:
        columns: With the scores of the same examples.
        metrics: Names of the metrics.
        seed: Of the draws.
    """
    n = len(columns[0].scores["nll"])
    statistics = [statistic(name, column.scores) for name in metrics for column in columns]
    drawn = distributions_of(statistics, n, draws_of(n), seed)
    width = len(columns)
    joined = {name: drawn[place * width : (place + 1) * width] for place, name in enumerate(metrics)}
    for name in metrics:
        split = name.removeprefix("ood_auroc/")
        if split != name and split in columns[0].outside:
            joined[name] = _areas(columns, split, seed)
    return joined


def distributions_of(statistics: Sequence[Statistic | None], n: int, draws: int, seed: int) -> list[np.ndarray | None]:
    """Return the bootstrap distribution of each statistic of `n` examples, all over the same draws; None stays None."""
    parts: list[list[np.ndarray]] = [[] for _ in statistics]
    for counts in _counts(n, draws, np.random.default_rng(seed)):
        for values, function in zip(parts, statistics, strict=True):
            if function is not None:
                values.append(function(counts))
    return [np.concatenate(values) if values else None for values in parts]


def interval(values: np.ndarray | None) -> tuple[float, float] | None:
    """Return the ends of the percentile interval of a distribution."""
    if values is None:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bins_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return the bin of every confidence, as torchmetrics' calibration error has it: the left edge belongs to a bin."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return (torch.bucketize(torch.from_numpy(confidence), edges, right=True).clamp(1, bins) - 1).numpy()


def statistic(name: str, scores: Mapping[str, np.ndarray]) -> Statistic | None:
    """Return a metric as a function of rows of counts."""
    if name == "ece" and {"confidence", "correct"} <= scores.keys():
        gap = scores["correct"] - scores["confidence"]
        by_bin = np.zeros((len(gap), BINS))
        by_bin[np.arange(len(gap)), bins_of(scores["confidence"])] = gap
        return lambda counts: np.abs(counts @ by_bin).sum(1) / counts.sum(1)
    if name == "rmse" and "squared_error" in scores:
        return lambda counts: np.sqrt(counts @ scores["squared_error"] / counts.sum(1))
    values = scores.get(_MEANS.get(name, name))
    return None if values is None else lambda counts: counts @ values / counts.sum(1)


def _counts(n: int, draws: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield rows of how often each of `n` examples was drawn in `n` draws with replacement."""
    step = max(1, _CHUNK // n)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        picked = random.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(picked.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _areas(columns: Sequence[Column], split: str, seed: int) -> list[np.ndarray | None]:
    """Return the distributions of the area under the ROC curve: confidences inside against those outside, ties by half."""
    sides = [(column.scores["confidence"], column.outside[split]) for column in columns]
    codes = []
    for inside, outside in sides:
        _, code = np.unique(np.concatenate([inside, outside]), return_inverse=True)
        codes.append((code[: len(inside)], code[len(inside) :], int(code.max()) + 1))
    n, m = (len(side) for side in sides[0])
    draws = draws_of(n + m)
    found = [np.empty(draws) for _ in columns]
    streams = (np.random.default_rng([seed, part]) for part in (0, 1))
    drawn = zip(*(_rows(size, draws, random) for size, random in zip((n, m), streams, strict=True)), strict=True)
    for draw, (inside, outside) in enumerate(drawn):
        for values, (own, other, size) in zip(found, codes, strict=True):
            there = np.bincount(own, inside, size)
            against = np.bincount(other, outside, size)
            values[draw] = there @ (against.cumsum() - against / 2) / (n * m)
    return found


def _rows(n: int, draws: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    return (row for chunk in _counts(n, draws, random) for row in chunk)
