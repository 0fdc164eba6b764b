"""The metrics of groups of examples, where the data say which group each one is of."""

from __future__ import annotations

from typing import Any

import numpy as np

from laplace_dist.report.html.columns import Evaluated
from laplace_dist.report.html.intervals import distributions_of, interval, statistic
from laplace_dist.report.metrics import labelled

FEW = 30  # examples of a group, below which its figures say little
DRAWN = 200


def slices(found: Evaluated, seed: int) -> dict[str, Any] | None:
    """Return the metrics of every group for every column, the worst NLL of the posterior first; None without groups.

    Args:
        found: The evaluation.
        seed: Of the bootstrap.
    """
    if not found.groups:
        return None
    groups = np.asarray(found.groups, dtype=object)
    names = [name for name in ("accuracy", "nll", "ece", "rmse", "coverage_90") if name in found.columns[0].metrics]
    rows = [_row(found, groups == group, str(group), names, seed) for group in sorted(set(found.groups))]
    rows.sort(key=lambda row: -row["values"]["nll"][1]["value"])
    labels = {name: labelled(name)[0] for name in names}
    return {
        "names": names,
        "labels": labels,
        "columns": [column.name for column in found.columns],
        "groups": rows,
        "few": FEW,
    }


def _row(found: Evaluated, inside: np.ndarray, group: str, names: list[str], seed: int) -> dict[str, Any]:
    n = int(inside.sum())
    some = [{score: each[inside] for score, each in column.scores.items()} for column in found.columns]
    statistics = [statistic(name, scores) for name in names for scores in some]
    ends = [interval(drawn) for drawn in distributions_of(statistics, n, DRAWN, seed)]
    values = [float(function(np.ones((1, n)))[0]) for function in statistics]
    cells = [{"value": value, "interval": end} for value, end in zip(values, ends, strict=True)]
    width = len(some)
    by_name = {name: cells[place * width : (place + 1) * width] for place, name in enumerate(names)}
    return {"group": group, "examples": n, "few": n < FEW, "values": by_name}
