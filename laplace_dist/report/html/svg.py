"""Matplotlib figures as SVG that takes its colours and its type from the page around it, in light and dark.

Colours are drawn as placeholders that no figure uses otherwise, and each is replaced by a variable of the page's style sheet.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS = {
    "ink": "#000001",
    "muted": "#000002",
    "line": "#000003",
    "map": "#000004",
    "laplace": "#000005",
    "other": "#000006",
    "good": "#000007",
    "bad": "#000008",
    "surface": "#000009",
    "series1": "#00000a",
    "series2": "#00000b",
    "series3": "#00000c",
    "series4": "#00000d",
    "series5": "#00000e",
    "series6": "#00000f",
}
DASHES = {"map": (0, (4, 2)), "laplace": "solid", "other": (0, (1, 1.5))}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def logarithmic(axis: Axis) -> None:
    """Label the powers of ten of a logarithmic axis in plain text, and not too many of them."""
    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
    """Write a power of ten as such where it is one with many digits."""
    exponent = round(math.log10(value))
    return f"{value:g}" if -3 <= exponent <= 4 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


@contextmanager
def styled(name: str) -> Iterator[None]:
    """Draw for a page, for a while; the ids in the figure follow from its name, so that no two figures share one."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def blank(width: float = 4.4, height: float = 2.9) -> Figure:
    """Return an empty figure, without pyplot's global state."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int = 1, *, width: float = 4.4, height: float = 2.9, **options: object) -> tuple[Figure, list[Axes]]:
    """Return a figure of some panels beside each other."""
    figure = blank(width, height)
    axes = figure.subplots(1, count, squeeze=False, **options)[0]
    return figure, list(axes)


def svg(figure: Figure, label: str) -> str:
    """Return the figure as an element to put into a page.

    Args:
        figure: The figure.
        label: What it shows, for those who do not see it; plain text of our own.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    found = re.sub(r"(?s)^.*?<svg ", "<svg ", text.getvalue())
    found = re.sub(r"(?s)<metadata>.*?</metadata>", "", found)
    found = re.sub(r'<g id="[^"]*"', "<g", found)
    found = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', found, count=1
    )
    found = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", found)
    for name, colour in COLOURS.items():
        found = found.replace(colour, f"var(--{name})")
    return found.strip()
