"""The figures of a training's report: a panel for each quantity over the epochs, with the chosen epoch upright."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from laplace_dist.report.html.svg import COLOURS, logarithmic, panels, styled, svg

WIDE = 20  # times the smallest prior precision, from where on the axis is logarithmic: it is labelled at powers of ten alone


def training_figures(found: Mapping[str, Any]) -> dict[str, str]:
    """Return a figure for everything that the epochs of a training have numbers of.

    Args:
        found: The section `training` of the report's numbers.
    """
    drawn = {}
    if _points(found, "log_marginal_likelihood"):
        drawn["evidence"] = _curve(found, "log_marginal_likelihood", "log marginal likelihood", "laplace")
    if _points(found, "loss"):
        drawn["loss"] = _curve(found, "loss", "training loss", "map")
    if any(epoch["prior_precision"] for epoch in found["epochs"]):
        drawn["priors"] = _priors(found)
    if _points(found, "sigma_noise"):
        drawn["noise"] = _curve(found, "sigma_noise", "observation noise", "series1")
    return drawn


def _points(found: Mapping[str, Any], name: str) -> list[tuple[int, float]]:
    return [(epoch["epoch"], epoch[name]) for epoch in found["epochs"] if epoch[name] is not None]


def _curve(found: Mapping[str, Any], name: str, label: str, colour: str) -> str:
    with styled(name):
        figure, (axes,) = panels()
        axes.plot(*zip(*_points(found, name), strict=True), color=COLOURS[colour], marker="o", markersize=2.5)
        axes.set(ylabel=label)
        _epochs(axes, found)
        return svg(figure, f"{label} by epoch".capitalize())


def _priors(found: Mapping[str, Any]) -> str:
    """Every prior precision over the epochs; of very many the smallest, the quartiles and the largest."""
    with styled("priors"):
        figure, (axes,) = panels()
        own = [epoch for epoch in found["epochs"] if epoch["prior_precision"]]
        lines = list(zip(*(epoch["prior_precision"] for epoch in own), strict=True))
        fade = max(0.25, min(1.0, 8 / len(lines)))
        numbers = [epoch["epoch"] for epoch in own]
        for line in lines:
            axes.plot(numbers, line, color=COLOURS["other"], alpha=fade, marker="o", markersize=2.5, linewidth=1.4)
        axes.set(ylabel="prior precision")
        if max(map(max, lines)) > WIDE * min(map(min, lines)):
            axes.set_yscale("log")
            logarithmic(axes.yaxis)
        _epochs(axes, found)
        return svg(figure, "Prior precision by epoch")


def _epochs(axes: Axes, found: Mapping[str, Any]) -> None:
    """Count epochs in whole numbers, and mark the chosen one."""
    if found["best_epoch"] is not None:
        axes.axvline(found["best_epoch"], color=COLOURS["good"], linewidth=1.4, zorder=0)
    axes.set(xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
