"""From the numbers to the page: one file with everything in it, which asks nothing of any network.

The template escapes whatever comes from names; figures are drawn from numbers alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from laplace_dist.report.html import figures
from laplace_dist.report.html.training_figures import training_figures
from laplace_dist.report.rate import duration, size


def page(found: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        found: `facts.facts(...)`.
    """
    template = _templates().get_template("training.html" if "training" in found else "report.html")
    return template.render(
        **found,
        name=found["fitted"]["checkpoint"].rstrip("/").rpartition("/")[2],
        figures={name: Markup(drawn) for name, drawn in _figures(found).items()},
        series=figures.SERIES,
        style=Markup(_text("style.css")),
        numbers=embedded(found),
    )


@lru_cache
def _templates() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, count=count, percent=percent, duration=duration, size=size, short=short)
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment


def embedded(found: Mapping[str, Any]) -> Markup:
    """Return the numbers as JSON that may stand inside a script element: no name in it can end the element."""
    text = json.dumps(found, allow_nan=False, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _text(name: str) -> str:
    return (resources.files("laplace_dist.report.html") / "templates" / name).read_text(encoding="utf-8")


def _figures(found: Mapping[str, Any]) -> dict[str, str]:
    """Return every figure that there are numbers for."""
    drawn = training_figures(found["training"]) if "training" in found else _of_fit(found)
    for place, job in enumerate(found["running"]["jobs"]):
        if len({alive for _, alive in job["workers"]}) > 1:
            drawn[f"workers{place}"] = figures.workers(job, f"workers{place}")
    return drawn


def _of_fit(found: Mapping[str, Any]) -> dict[str, str]:
    drawn = {}
    if (own := found["calibration"]) is not None:
        drawn |= {"reliability": figures.reliability(own), "risk_coverage": figures.risk_coverage(own)}
        drawn["confidences"] = figures.confidences(own)
        if own["splits"]:
            drawn["roc"] = figures.roc(own)
    if (own := found["regression"]) is not None:
        drawn |= {"curve": figures.calibration_curve(own), "widths": figures.interval_widths(own)}
        outputs = range(len(own["columns"][0]["residuals"]))
        drawn |= {f"residuals{output}": figures.residuals(own, output) for output in outputs}
    if (own := found["tuned"]) is not None and any(score is not None for _, score in own["curve"]):
        drawn["prior"] = figures.prior(own)
    if any(own["values"] and own["values"][0] > 0 for own in found["spectra"]):
        drawn["spectra"] = figures.spectra(found["spectra"])
    if found["history"]["recalibrations"]:
        drawn["windows"] = figures.windows(found["history"]["recalibrations"])
    return drawn


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many digits that count; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0 or (float(value).is_integer() and 1 < abs(value) < 1e6):
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}f}" if abs(value) < 10 else f"{value:,.{max(0, digits - 2)}f}"
        return text.replace("-", "−")
    return f"{value:.{digits - 1}g}".replace("-", "−")


def count(value: float | None) -> str:
    """Write a whole number with separators."""
    return "–" if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def percent(value: float | None) -> str:
    """Write a share as a percentage; one that is nearly nothing, or nearly all, is not rounded to that."""
    if value is None:
        return "–"
    text = "< 0.1 %" if 0 < value < 0.0005 else "> 99.9 %" if 0.9995 <= value < 1 else f"{value:.1%}".replace("%", " %")
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def short(value: Any) -> str:
    """Write the beginning of a digest."""
    return "–" if value is None else str(value)[:16]
