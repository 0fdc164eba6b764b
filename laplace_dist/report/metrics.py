"""What a person sees at the end of a job: where the result lies, and the table of metrics."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

NAMES = {
    "accuracy": ("accuracy", True),
    "nll": ("NLL", False),
    "brier": ("Brier", False),
    "ece": ("ECE", False),
    "rmse": ("RMSE", False),
    "coverage_90": ("coverage of 90 % intervals", None),
}


def metrics_table(metrics: Mapping[str, Mapping[str, float]], helps: bool = True) -> Table:
    """Return the table MAP | Laplace, or MAP | current | candidate; an arrow says which direction is better.

    Args:
        metrics: The numbers by name, for each column.
        helps: Whether Laplace is anything else than the limit in which it is MAP.
    """
    laplace = "Laplace" if helps else "Laplace, kept at MAP"
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("metric")
    for method in metrics:
        table.add_column({"map": "MAP", "laplace": laplace}.get(method, method), justify="right")
    for name in metrics["map"]:
        text, higher = labelled(name)
        arrow = {True: " ↑", False: " ↓", None: ""}[higher]
        table.add_row(text + arrow, *(f"{metrics[method][name]:z.4f}" for method in metrics))
    return table


def labelled(name: str) -> tuple[str, bool | None]:
    """Return what a metric is called for people, and whether more of it is better; None where nobody knows."""
    higher = True if name.startswith("ood_auroc/") else None  # of what a user's own likelihood counts, nobody knows
    return NAMES.get(name, (name.replace("ood_auroc/", "OOD AUROC, "), higher))


def show_result(result: Any, loading: str, out: TextIO | None = None) -> None:
    """Print where the checkpoint lies, how to load the posterior, the table, and the report as the last line.

    Args:
        result: A `driver.Result`.
        loading: Python lines that load the posterior.
        out: Where to print.
    """
    out = out or sys.stdout
    print(f"\ncheckpoint: {result.checkpoint}", file=out)
    if result.version is not None:
        print(f"posterior:  {result.version}\n\nIn Python:\n", file=out)
        print("\n".join(f"    {line}" for line in loading.splitlines()), file=out)
    if result.metrics is not None:
        print(file=out)
        for text in result.notes:
            print(f"{text}\n", file=out)
        table = metrics_table(result.metrics, result.helps)
        Console(file=out, width=80, highlight=False, soft_wrap=True).print(table)
    if result.report is not None:
        print(f"\nreport: {result.report}", file=out)
    out.flush()


def show_recalibration(found: Any, out: TextIO | None = None) -> None:
    """Print what a recalibration has found: the table, the report, and last the decision with the figure that decided.

    Args:
        found: A `recalibration.Recalibration`.
        out: Where to print.
    """
    out = out or sys.stdout
    print(f"\ncheckpoint: {found.checkpoint}\ncandidate:  {found.version}\n", file=out)
    for text in found.notes:
        print(f"{text}\n", file=out)
    Console(file=out, width=80, highlight=False, soft_wrap=True).print(metrics_table(found.metrics))
    if found.report is not None:
        print(f"\nreport: {found.report}", file=out)
    if found.noticed:
        names = ", ".join(found.noticed)
        print(f"\ndrift: {names}: not what it was when the current posterior was accepted", file=out)
    print(f"\n{'promoted' if found.promoted else 'kept the current posterior'}: {found.why}", file=out, flush=True)
