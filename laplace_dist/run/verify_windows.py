"""The part of a verification that is about windows after the first, and about versions that are weighted sums of windows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, versions, windows
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.checks import Check, Place
from laplace_dist.run.combination import Term, Window, place_of
from laplace_dist.run.findings import Checker, Findings
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.verify_sums import SumsCheck


def check_windows(checker: Checker, plan: Plan, keys: Collection[str], whole: Sequence[str]) -> None:
    """Check every window after the first, the versions that are sums of several, and what recalibrations have found.

    Args:
        checker: Of the verification.
        plan: Of the run.
        keys: All objects.
        whole: Names of the posterior versions whose arrays are whole.
    """
    there = {plan.window_name: Window(checker.store, plan)}
    for name in sorted(
        {key.split("/")[1] for key in keys if key.startswith(f"{layout.WINDOWS}/") and key.count("/") > 1}
    ):
        found = _check_window(checker, plan, name, keys)
        if found is not None:
            there[name] = found
    for version in whole:
        key = layout.version_key(version)
        if checker.attempt(key, lambda v=version: _is_the_sum(checker, plan, there, v)) is False:
            text = f"{key}: its factors are not the weighted sum of its windows. Delete it and run its job again."
            checker.found.problem(key, text)
    for key in sorted(keys):
        if re.fullmatch(r"recalibration/(lease|drift|[^/]+/decision)\.json", key):
            found = checker.attempt(key, lambda k=key: open_json(checker.store.read(k), k))
            if found is not None:
                checker.found.came_from(found) if "environment" in found else None


def _check_window(checker: Checker, run: Plan, name: str, keys: Collection[str]) -> Window | None:
    """Check one window as a run of its own; returns it if it belongs to the run."""
    return check_place(checker, run, f"{layout.WINDOWS}/{name}/", place_of(checker.store, run, name), keys)


def check_place(checker: Checker, run: Plan, prefix: str, store: Checkpoint, keys: Collection[str]) -> Window | None:
    """Check what is laid out like a window, as a run of its own; returns it if it belongs to the run.

    Args:
        checker: Of the verification.
        run: Plan of the run.
        prefix: Where it lies, with a slash at its end.
        store: Of what lies there.
        keys: All objects.
    """
    own = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    found = Findings()
    inner = Checker(store, found, own, shallow=checker.shallow)
    try:
        plan = inner.attempt(layout.PLAN, lambda: read_plan(store))
    except MissingObjectError:
        plan = None
    if plan is not None and plan.run != run.run_id:
        checker.found.notes.append(
            (f"{prefix}{layout.PLAN}", f"{prefix} is of another run, which was deleted (--fresh). Delete it.")
        )
        return None
    if plan is not None:
        _sums(inner, store, plan, own)
    checker.found.add(
        Findings(
            [(prefix + key, text) for key, text in found.problems],
            [(prefix + key, text) for key, text in found.notes],
            found.environments,
        )
    )
    return None if plan is None else Window(store, plan)


def _sums(checker: Checker, store: Checkpoint, plan: Plan, keys: list[str]) -> None:
    place = Place(store, plan, lambda: None, frozenset(keys), checker.shallow)

    def here(_: str, checks: Sequence[Check]) -> Iterator[Findings]:
        return (place.find(check) for check in checks)

    sums = SumsCheck(checker, plan, keys, here)
    object.__setattr__(place, "manifests", sums.manifests)
    sums.run()


def _is_the_sum(checker: Checker, plan: Plan, there: dict[str, Window], version: str) -> bool | None:
    """Compare a version of several windows with their sum; None where that was done elsewhere or cannot be done."""
    manifest = versions.read_version(checker.store, plan, version)
    named = manifest.get("windows") or []
    if checker.shallow or not named or [(t["window"], t["weight"]) for t in named] == [(plan.window_name, 1.0)]:
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
        if versions.factors_of(plan, terms, [name])[name].tobytes() != value.tobytes():
            return False
    return True
