"""The table of metrics with intervals, and what may be said of it in a sentence."""

from __future__ import annotations

from typing import Any

from laplace_dist.report.html.columns import Column, Evaluated
from laplace_dist.report.html.intervals import LEVEL, distributions, draws_of, interval
from laplace_dist.report.metrics import labelled


def table(found: Evaluated, seed: int) -> dict[str, Any]:
    """Return the metrics of all columns with intervals, and of each the difference between Laplace and MAP.

    Args:
        found: The evaluation.
        seed: Of the bootstrap.
    """
    columns = found.columns
    names = list(columns[0].metrics)
    drawn = distributions(columns, names, seed)
    rows = []
    for name in names:
        label, higher = labelled(name)
        values = [_value(column, name, own) for column, own in zip(columns, drawn[name], strict=True)]
        pair = drawn[name][:2]
        change = None if any(side is None for side in pair) else interval(pair[1] - pair[0])
        difference = columns[1].metrics[name] - columns[0].metrics[name]
        rows.append(
            {
                "name": name,
                "label": label,
                "higher_is_better": higher,
                "values": values,
                "difference": {"value": difference, "interval": change},
                "verdict": _verdict(change, higher),
            }
        )
    n = len(columns[0].scores["nll"])
    return {
        "columns": [{"name": column.name, "style": column.style} for column in columns],
        "rows": rows,
        "examples": n,
        "draws": draws_of(n),
        "level": LEVEL,
        "seed": seed,
    }


def _value(column: Column, name: str, drawn: Any) -> dict[str, Any]:
    return {"value": column.metrics[name], "interval": interval(drawn)}


def _verdict(change: tuple[float, float] | None, higher: bool | None) -> str:
    """Say what the interval of Laplace minus MAP does: `better`, `worse`, `same`, `open`; `unknown` without a direction."""
    if change is None or higher is None:
        return "unknown"
    if change == (0, 0):
        return "same"
    low, high = change if higher else (-change[1], -change[0])
    return "better" if low > 0 else "worse" if high < 0 else "open"
