"""Of Gaussian predictions: are intervals as wide as they say, how wide are they, and what is left over."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtri

from laplace_dist.report.html.columns import Column

LEVELS = np.arange(0.05, 1, 0.05)
SHARES, POINTS, OUTPUTS = 24, 600, 4  # bins of a histogram; residuals that are drawn; outputs that are drawn


def regression(columns: list[Column]) -> dict[str, Any] | None:
    """Return calibration curves, widths of 90 % intervals and residuals, or None where predictions were not kept."""
    if not all({"mean", "deviation", "target"} <= column.details.keys() for column in columns):
        return None
    return {
        "columns": [
            {
                "column": column.name,
                "style": column.style,
                "calibration": curve(column),
                "width": widths(column),
                "residuals": residuals(column),
            }
            for column in columns
        ],
        "outputs": columns[0].details["mean"].shape[1],
    }


def curve(column: Column) -> dict[str, list[float]]:
    """Return the share of targets inside central intervals, over the share that should be (Kuleshov et al., ICML 2018)."""
    mean, deviation, target = (column.details[name] for name in ("mean", "deviation", "target"))
    z = np.abs(target - mean) / deviation
    observed = [float((z <= ndtri((1 + level) / 2)).mean()) for level in LEVELS]
    return {"expected": LEVELS.round(2).tolist(), "observed": observed}


def widths(column: Column) -> dict[str, Any]:
    """Return a histogram of the widths of central 90 % intervals over all outputs, and their quartiles."""
    width = 2 * ndtri(0.95) * column.details["deviation"].ravel()
    share, edges = np.histogram(width, SHARES)
    quartiles = np.quantile(width, [0.25, 0.5, 0.75]).tolist()
    return {"edges": edges.tolist(), "share": (share / len(width)).tolist(), "quartiles": quartiles}


def residuals(column: Column) -> list[dict[str, list[float]]]:
    """Return, for the first outputs, target minus mean and the standard deviation over the mean, for evenly picked examples."""
    mean, deviation, target = (column.details[name] for name in ("mean", "deviation", "target"))
    picked = np.unique(np.linspace(0, len(mean) - 1, min(len(mean), POINTS)).round().astype(int))
    return [
        {
            "mean": mean[picked, output].tolist(),
            "residual": (target - mean)[picked, output].tolist(),
            "deviation": deviation[picked, output].tolist(),
        }
        for output in range(min(mean.shape[1], OUTPUTS))
    ]
