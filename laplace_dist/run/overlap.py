"""Windows that hold the same examples, which a posterior of both would count twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations

import numpy as np

from laplace.drift.duplicates import Common
from laplace_dist.errors import SettingsError, listed
from laplace_dist.plan.sketch import ALL, SURE, Sketch, shared
from laplace_dist.run.combination import Term


def refuse_shared(
    terms: Sequence[Term],
    accepted: Collection[str],
    allowed: float,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Refuse windows that have more examples in common than what repeats within them explains.

    Args:
        terms: The windows that a posterior is to be made of.
        accepted: Names of windows that make the current posterior, which are not compared among each other again.
        allowed: The share of the smaller window's examples that may be in both beyond that.
        say: Where a line goes about windows of which it is not known.

    Raises:
        SettingsError: Naming two windows, and how many examples they share.
    """
    found = {term.window.name: term.manifest.get("examples") for term in terms}
    if (unknown := [name for name, values in found.items() if values is None]) and len(terms) > 1:
        say(
            f"whether {listed(unknown)} shares examples with other windows is not known: an older version has read them, or "
            "--collate makes batches of which an example is no row"
        )
    sketches = {name: Sketch.from_values(values) for name, values in found.items() if values is not None}
    for one, other in combinations(sketches, 2):
        if one in accepted and other in accepted:
            continue
        both, size = shared(sketches[one], sketches[other])
        share = both.excess / max(size, 1)
        if both.p_value <= SURE and share > allowed:
            raise SettingsError(_message(one, other, sketches, both, size, share))


def _message(one: str, other: str, sketches: Mapping[str, Sketch], both: Common, size: int, share: float) -> str:
    sampled = "" if all(sketches[name].limit == ALL for name in (one, other)) else " sampled"
    return (
        f"--data: window {other} shares examples with window {one}: {both.values} different ones of {size}{sampled} ones of "
        f"the smaller window, of which {both.explained:.1f} are explained by what repeats within windows. They would count "
        "twice. Give data that no window has; or leave one of the two out, with --windows or --drop-window; or, if they are to "
        f"count all the same, --shared-examples {min(1.0, np.ceil(share * 100) / 100):g}"
    )
