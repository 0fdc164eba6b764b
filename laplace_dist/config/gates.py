"""Point thresholds that a candidate has to meet beside the comparison: `nll<=0.005`, `candidate:accuracy>=0.9`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_dist.errors import SettingsError

_FORM = re.compile(r"(candidate:)?([A-Za-z_][\w./-]*)(<=|>=)([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
ACCEPTED = (
    "thresholds of the form METRIC<=NUMBER or METRIC>=NUMBER for the candidate's figure minus the current one's, such as "
    "nll<=0.005, or candidate:METRIC>=NUMBER for the candidate's own, such as candidate:accuracy>=0.9"
)


@dataclass(frozen=True)
class Gate:
    """A threshold.

    Attributes:
        text: As it was given.
        own: It bounds the candidate's own figure; else that minus the current posterior's.
        metric: Name of the figure, as in the table's metrics.
        upper: It is an upper bound.
        value: The bound, which is met with equality too.
    """

    text: str
    own: bool
    metric: str
    upper: bool
    value: float


def parse(text: str) -> Gate:
    """Return the threshold that a text says.

    Raises:
        ValueError: It says none.
    """
    match = _FORM.fullmatch(text.replace(" ", ""))
    if match is None or not math.isfinite(float(match[4])):
        raise ValueError(f"{ACCEPTED}, and not {text!r}")
    return Gate(text, bool(match[1]), match[2], match[3] == "<=", float(match[4]))


def refuse_unknown(gate: Gate, names: Sequence[str]) -> None:
    """Refuse a threshold on a figure that is none of these.

    Raises:
        SettingsError: It names another one.
    """
    if gate.metric not in names:
        raise SettingsError(
            f"--gate: got {gate.text!r}, but there is no figure {gate.metric!r}; there are {', '.join(names)}. Nothing was "
            "promoted"
        )


def check(texts: Sequence[str], candidate: Mapping[str, float], current: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare every threshold with the figures; returns `gate`, `value` and `met` of each.

    Raises:
        SettingsError: A threshold names a figure that the evaluation does not have.
    """
    found = []
    for gate in map(parse, texts):
        refuse_unknown(gate, list(candidate))
        value = candidate[gate.metric] - (0.0 if gate.own else current[gate.metric])
        found.append(
            {"gate": gate.text, "value": value, "met": value <= gate.value if gate.upper else value >= gate.value}
        )
    return found


def why_not(found: Sequence[Mapping[str, Any]]) -> str | None:
    """Say which threshold is not met, the first of them; None if all are."""
    failed = next((gate for gate in found if not gate["met"]), None)
    if failed is None:
        return None
    what = "the candidate's own figure" if failed["gate"].startswith("candidate:") else "candidate minus current"
    return f"--gate {failed['gate']}: {what} is {failed['value']:+z.4f}: it is not met"
