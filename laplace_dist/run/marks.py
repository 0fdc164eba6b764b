"""Whether the bytes under a name that runs use are a run's own: users have files of the same names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from laplace_dist.run.layout import CONFIG, COVERAGE, METRICS, NUMBERS, PLAN, REPORT, WEIGHTS, WEIGHTS_INDEX, owned
from laplace_dist.run.settings_file import is_sealed_yaml
from laplace_dist.run.weights import is_sealed

GENERATOR = "laplace_dist"  # in the page's head
_MARK = re.compile(rb'<meta name="generator" content="' + GENERATOR.encode() + rb'">|<footer>Made by laplace_dist ')


def is_own(key: str, read: Callable[[str], bytes]) -> bool:
    """Say whether an object is a run's: its key is one of the layout's and, where others use that name too, its content is one.

    What was altered is a run's own still: its form is looked at, and not whether its digest is right.

    Args:
        key: Of the object.
        read: Returns the bytes under a key.
    """
    return owned(key) and (key not in _MARKS or _MARKS[key](read(key)))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _has(*names: str) -> Callable[[bytes], bool]:
    """Return what says whether bytes are a JSON object with some fields."""

    def check(content: bytes) -> bool:
        found = _json(content)
        return isinstance(found, dict) and {*names} <= found.keys()

    return check


_MARKS: dict[str, Callable[[bytes], bool]] = {
    PLAN: _has("sha256", "format_version"),
    CONFIG: is_sealed_yaml,
    WEIGHTS: is_sealed,
    WEIGHTS_INDEX: _has("sha256", "format_version", "weight_map"),
    COVERAGE: is_sealed_yaml,
    REPORT: lambda content: bool(_MARK.search(content)),
    METRICS: _has("version", "tuning"),
    NUMBERS: _has("fitted", "made"),
}
