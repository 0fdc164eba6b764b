"""The part of a verification that is about windows after the first, and about versions that are weighted sums of windows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, versions, windows
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.combination import Term, Window, place_of
from laplace_dist.run.findings import Checker
from laplace_dist.run.verify_places import check_place, check_second_passes
from laplace_dist.run.verify_sums import SumsCheck


def check_windows(
    checker: Checker, plan: Plan, keys: Collection[str], whole: Sequence[str], first: SumsCheck
) -> dict[str, tuple[str, SumsCheck]]:
    """Check every window after the first, the versions that are sums of several, and what recalibrations have found.

    Args:
        checker: Of the verification.
        plan: Of the run.
        keys: All objects.
        whole: Names of the posterior versions whose arrays are whole.
        first: What was found of the sums of the first window.

    Returns:
        Of every window by its name the prefix of where it was read, and what was found of the sums there: its first pass if
        it has one, else its second.
    """
    sums = {plan.window_name: ("", first)}
    for name in sorted(
        {key.split("/")[1] for key in keys if key.startswith(f"{layout.WINDOWS}/") and key.count("/") > 1}
    ):
        prefix, store = f"{layout.WINDOWS}/{name}/", place_of(checker.store, plan, name)
        found = check_place(checker, plan, prefix, store, keys)
        if found is not None:
            sums[name] = prefix, found
    there = {name: Window(own.store, own.plan) for name, (_, own) in sums.items()}
    if plan.further is not None:
        second = check_second_passes(checker, plan, there, keys, used=bool(whole))
        sums |= {name: found for name, found in second.items() if name != plan.window_name}
        there = {name: Window(own.store, own.plan) for name, (_, own) in second.items()}
    for version in whole:
        key = layout.version_key(version)
        if checker.attempt(key, lambda v=version: _is_the_sum(checker, plan, there, v)) is False:
            text = f"{key}: its factors are not the weighted sum of its windows. Delete it and run its job again."
            checker.found.problem(key, text)
    for key in sorted(keys):
        if re.fullmatch(rf"{layout.RECALIBRATIONS}/(lease|drift|[^/]+/decision)\.json", key):
            found = checker.attempt(key, lambda k=key: open_json(checker.store.read(k), k))
            if found is not None:
                checker.found.came_from(found) if "environment" in found else None
    return sums


def _is_the_sum(checker: Checker, plan: Plan, there: dict[str, Window], version: str) -> bool | None:
    """Compare a version of several windows with their sum; None where that was done elsewhere or cannot be done."""
    manifest = versions.read_version(checker.store, plan, version)
    named = manifest.get("windows") or []
    alone = plan.further is None and [(t["window"], t["weight"]) for t in named] == [(plan.window_name, 1.0)]
    if checker.shallow or not named or alone:
        return None
    if not {term["window"] for term in named} <= there.keys():
        return None
    terms = []
    for one in named:
        window = there[one["window"]]
        terms.append(Term(window, one["weight"], windows.read_window(window.store, window.plan)))
    if versions.version_of(terms) != version:
        return False
    for name, place in manifest["factors"].items():
        value = checker.store.read_array(place["prefix"], name, place["entry"])
        if versions.factors_of(terms, [name])[name].tobytes() != value.tobytes():
            return False
    return True
