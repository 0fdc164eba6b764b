"""The figures of a report, drawn from its numbers alone. Names that users gave stay out of them: the page has the legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from laplace_dist.report.html.svg import COLOURS, DASHES, blank, logarithmic, panels, styled, svg

SERIES = tuple(f"series{number}" for number in range(1, 7))


def reliability(found: Mapping[str, Any]) -> str:
    """Accuracy over confidence, with the numbers of examples below."""
    with styled("reliability"):
        figure = blank(height=3.9)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1)
        columns = found["columns"]
        for place, column in enumerate(columns):
            own = column["reliability"]
            there = [i for i, count in enumerate(own["count"]) if count]
            points = [own["confidence"][i] for i in there], [own["accuracy"][i] for i in there]
            above.plot(*points, marker="o", markersize=3.5, **_line(column))
            step = own["edges"][1]
            width = step * 0.84 / len(columns)
            left = [edge + step * 0.08 + place * width for edge in own["edges"][:-1]]
            below.bar(left, own["count"], width, align="edge", color=COLOURS[column["style"]])
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        below.set(xlabel="confidence", ylabel="examples")
        return svg(figure, "Reliability diagram: accuracy over confidence, and the number of examples in each bin")


def risk_coverage(found: Mapping[str, Any]) -> str:
    """Share of errors over the share of examples that are kept, the most confident first."""
    with styled("risk"):
        figure, (axes,) = panels()
        for column in found["columns"]:
            own = column["risk_coverage"]
            axes.plot(own["coverage"], own["risk"], **_line(column))
        axes.set(xlim=(0, 1), xlabel="share of examples kept", ylabel="share of errors among them")
        axes.set_ylim(bottom=0)
        return svg(figure, "Risk-coverage curve")


def confidences(found: Mapping[str, Any]) -> str:
    """Confidences inside the distribution, filled, and outside, as lines; a panel for each of MAP and Laplace."""
    with styled("confidence"):
        figure, axes = panels(2, height=2.7, sharey=True)
        for panel, column in zip(axes, found["columns"], strict=False):
            inside = column["inside"]
            panel.stairs(inside["share"], inside["edges"], fill=True, color=COLOURS["muted"], alpha=0.45)
            for colour, split in zip(_cycle(found["splits"]), found["splits"], strict=True):
                own = column["outside"][split]
                panel.stairs(own["share"], own["edges"], color=COLOURS[colour], linewidth=1.6)
            panel.set(xlim=(0, 1), title=column["column"], xlabel="confidence")
        axes[0].set_ylabel("share of examples")
        return svg(figure, "Histograms of confidence in and out of distribution, for MAP and Laplace")


def roc(found: Mapping[str, Any]) -> str:
    """ROC of telling inside from outside; a colour for each split, MAP dashed."""
    with styled("roc"):
        figure, (axes,) = panels(height=3.2)
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1)
        for column in found["columns"]:
            for colour, split in zip(_cycle(found["splits"]), found["splits"], strict=True):
                own = column["roc"][split]
                style = DASHES[column["style"]]
                axes.plot(own["false_positive"], own["true_positive"], color=COLOURS[colour], linestyle=style)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="outside taken for inside", ylabel="inside taken for inside")
        return svg(figure, "ROC curves of telling in- from out-of-distribution examples by confidence")


def prior(found: Mapping[str, Any]) -> str:
    """Mean NLL of the validation data over the prior precision, with the chosen value."""
    with styled("prior"):
        figure, (axes,) = panels()
        points = [(value, score) for value, score in found["curve"] if score is not None]
        axes.plot(*zip(*points, strict=True), color=COLOURS["laplace"], marker="o", markersize=2.5, linewidth=1.4)
        axes.axvline(found["prior_precision"][0], color=COLOURS["bad" if found["warning"] else "good"], linewidth=1.4)
        axes.set(xscale="log", xlabel="prior precision", ylabel="NLL on validation data")
        logarithmic(axes.xaxis)
        _scale_to_the_low(axes, [score for _, score in points])
        return svg(figure, "Negative log likelihood over the prior precision, with the chosen value")


def spectra(found: Sequence[Mapping[str, Any]]) -> str:
    """Eigenvalues of every factor over their rank, relative to the largest."""
    with styled("spectra"):
        figure, (axes,) = panels(height=3.1)
        drawn = [own for own in found if own["values"] and own["values"][0] > 0]
        fade = max(0.25, min(0.9, 8 / max(1, len(drawn))))
        for own in drawn:
            values = [max(value / own["values"][0], 1e-16) for value in own["values"]]
            ranks = [place / max(1, len(values) - 1) for place in range(len(values))]
            axes.plot(ranks, values, color=COLOURS[_side(own["factor"])], alpha=fade, linewidth=1.3)
        axes.set(
            yscale="log", xlim=(0, 1), xlabel="rank, from the largest to the smallest", ylabel="eigenvalue / largest"
        )
        logarithmic(axes.yaxis)
        return svg(figure, "Spectra of the curvature factors")


def calibration_curve(found: Mapping[str, Any]) -> str:
    """Share of targets inside central intervals over the share that should be."""
    with styled("curve"):
        figure, (axes,) = panels(height=3.2)
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1)
        for column in found["columns"]:
            own = column["calibration"]
            axes.plot(own["expected"], own["observed"], marker="o", markersize=2.5, **_line(column))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="central interval", ylabel="share of targets inside")
        return svg(figure, "Calibration curve of central intervals")


def interval_widths(found: Mapping[str, Any]) -> str:
    """Widths of central 90 % intervals."""
    with styled("widths"):
        figure, (axes,) = panels()
        for column in found["columns"]:
            own = column["width"]
            same = own["quartiles"][0] == own["quartiles"][2]
            if same:  # as of MAP, whose intervals have the noise alone
                axes.axvline(own["quartiles"][0], **_line(column))
            else:
                axes.stairs(own["share"], own["edges"], **_line(column))
        axes.set(xlabel="width of the 90 % interval", ylabel="share of targets")
        return svg(figure, "Histogram of the widths of 90 percent intervals")


def residuals(found: Mapping[str, Any], output: int) -> str:
    """Target minus mean of one output over the mean, with the interval that Laplace predicts."""
    own = next(column for column in found["columns"] if column["style"] == "laplace")["residuals"][output]
    with styled(f"residuals{output}"):
        figure, (axes,) = panels()
        order = sorted(range(len(own["mean"])), key=own["mean"].__getitem__)
        mean, deviation = ([own[name][i] for i in order] for name in ("mean", "deviation"))
        band = [1.645 * value for value in deviation]
        axes.vlines(mean, [-value for value in band], band, color=COLOURS["laplace"], alpha=0.18, linewidth=1.5)
        axes.scatter(own["mean"], own["residual"], s=5, color=COLOURS["ink"], alpha=0.7, linewidths=0)
        axes.set(xlabel="predicted mean", ylabel="target − mean")
        return svg(figure, "Residuals over the predicted mean, with 90 percent intervals")


def workers(job: Mapping[str, Any], name: str) -> str:
    """Number of workers over the time of a job."""
    with styled(name):
        figure, (axes,) = panels(height=1.9)
        seconds, alive = zip(*job["workers"], strict=True)
        axes.step([*seconds, job["seconds"]], [*alive, alive[-1]], where="post", color=COLOURS["laplace"])
        axes.set(xlabel="seconds since the job began", ylabel="workers")
        axes.set_ylim(0, max(alive) * 1.15 + 0.1)
        axes.yaxis.get_major_locator().set_params(integer=True)
        return svg(figure, "Workers over time")


def windows(found: Sequence[Mapping[str, Any]]) -> str:
    """NLL of MAP, current and candidate by recalibration; what was promoted is filled."""
    with styled("windows"):
        figure, (axes,) = panels(height=2.9)
        places = range(1, len(found) + 1)
        for name, style in (("map", "map"), ("current", "other"), ("candidate", "laplace")):
            values = [own["metrics"][name]["nll"] for own in found]
            axes.plot(places, values, **_line({"style": style}))
        for place, own in zip(places, found, strict=True):
            face = COLOURS["laplace"] if own["promoted"] else COLOURS["surface"]
            value = own["metrics"]["candidate"]["nll"]
            axes.plot(place, value, "o", markersize=7, markerfacecolor=face, markeredgecolor=COLOURS["laplace"])
        axes.set(xlabel="recalibration", ylabel="NLL on fresh data")
        axes.xaxis.get_major_locator().set_params(integer=True)
        return svg(figure, "Negative log likelihood by recalibration")


def _line(column: Mapping[str, Any]) -> dict[str, Any]:
    return {"color": COLOURS[column["style"]], "linestyle": DASHES[column["style"]]}


def _cycle(names: Sequence[str]) -> list[str]:
    return [SERIES[place % len(SERIES)] for place in range(len(names))]


def _side(factor: str) -> str:
    """Return the colour of a factor: of inputs, of output gradients, or of a block that is not a product."""
    return {"A": "series1", "B": "series2"}.get(factor.rpartition("/")[2], "series3")


def _scale_to_the_low(axes: Axes, scores: Sequence[float]) -> None:
    """Let the low part of a curve fill the panel, where a few values are far above it."""
    low, middle = min(scores), sorted(scores)[len(scores) // 2]
    top = max(scores)
    if top - low > 6 * max(middle - low, 1e-12):
        axes.set_ylim(low - 0.1 * (middle - low) - 1e-12, low + 6 * (middle - low) + 1e-12)
