"""Of predictions with a confidence: reliability, risk over coverage, confidences inside and outside, ROC."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from laplace_dist.report.html.columns import Column
from laplace_dist.report.html.intervals import BINS, bins_of

POINTS = 101  # of a curve
SHARES = 20  # bins of a histogram


def reliability(column: Column) -> dict[str, Any]:
    """Return mean confidence, accuracy and number of examples of equally wide bins of confidence; empty ones are None."""
    confidence, correct = column.scores["confidence"], column.scores["correct"]
    which = bins_of(confidence)
    counts = np.bincount(which, minlength=BINS)
    sums = [np.bincount(which, values, BINS) for values in (confidence, correct)]
    mean, accuracy = ([_ratio(a, b) for a, b in zip(values, counts, strict=True)] for values in sums)
    return {"confidence": mean, "accuracy": accuracy, "count": counts.tolist(), "edges": _edges(BINS)}


def risk_coverage(column: Column) -> dict[str, Any]:
    """Return the share of errors among the most confident examples, over the share that is kept, and the area under it.

    Examples of equal confidence are kept or left together: each carries the mean error of those.

    Source: Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017.
    """
    confidence, wrong = column.scores["confidence"], 1 - column.scores["correct"]
    _, code = np.unique(-confidence, return_inverse=True)
    mean = np.bincount(code, wrong) / np.bincount(code)
    risk = mean[np.sort(code)].cumsum() / np.arange(1, len(wrong) + 1)
    picked = _picked(len(risk))
    return {
        "coverage": ((picked + 1) / len(risk)).tolist(),
        "risk": risk[picked].tolist(),
        "area": float(risk.mean()),
    }


def histogram(values: np.ndarray) -> dict[str, Any]:
    """Return the shares of confidences in equally wide bins."""
    counts = np.histogram(values, SHARES, (0, 1))[0]
    return {"edges": _edges(SHARES), "share": (counts / max(1, counts.sum())).tolist(), "count": int(counts.sum())}


def roc(column: Column, split: str) -> dict[str, Any]:
    """Return the ROC curve of telling inside from outside by confidence, and the area under it."""
    inside, outside = column.scores["confidence"], column.outside[split]
    labels = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    values = np.concatenate([inside, outside])
    false, true, _ = roc_curve(labels, values)
    picked = _picked(len(false))
    area = float(roc_auc_score(labels, values))
    return {"false_positive": false[picked].tolist(), "true_positive": true[picked].tolist(), "area": area}


def calibration(columns: list[Column]) -> dict[str, Any] | None:
    """Return all of the above for every column, or None where predictions have no confidence."""
    if not all({"confidence", "correct"} <= column.scores.keys() for column in columns):
        return None
    splits = [split for split in columns[0].outside if all(split in column.outside for column in columns)]
    own = [
        {
            "column": column.name,
            "style": column.style,
            "reliability": reliability(column),
            "risk_coverage": risk_coverage(column),
            "inside": histogram(column.scores["confidence"]),
            "outside": {split: histogram(column.outside[split]) for split in splits},
            "roc": {split: roc(column, split) for split in splits},
        }
        for column in columns
    ]
    return {"columns": own, "splits": splits}


def _picked(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))


def _edges(bins: int) -> list[float]:
    return (np.arange(bins + 1) / bins).tolist()


def _ratio(total: float, count: int) -> float | None:
    return float(total / count) if count else None
