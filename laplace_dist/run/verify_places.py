"""The part of a verification that is about what is laid out like a checkpoint of its own: windows, and their second passes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import bases, layout, windows
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.checks import Check, Place
from laplace_dist.run.combination import Window, alone
from laplace_dist.run.findings import Checker, Findings
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.second_pass import place_of_second, second_plan
from laplace_dist.run.settings_file import read_config
from laplace_dist.run.verify_sums import SumsCheck


def check_place(checker: Checker, run: Plan, prefix: str, store: Checkpoint, keys: Collection[str]) -> SumsCheck | None:
    """Check one place as a run of its own; returns what was found of its sums, with its plan, if it belongs to the run.

    Args:
        checker: Of the verification.
        run: Plan of the run.
        prefix: Of the place's keys, with a slash at its end.
        store: Of the place.
        keys: All objects of the run.
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
    sums = None if plan is None else _sums(inner, store, plan, own)
    if layout.CONFIG in own:
        inner.attempt(layout.CONFIG, lambda: read_config(store))
    checker.found.add(
        Findings(
            [(prefix + key, text) for key, text in found.problems],
            [(prefix + key, text) for key, text in found.notes],
            found.environments,
        )
    )
    return sums


def _sums(checker: Checker, store: Checkpoint, plan: Plan, keys: list[str]) -> SumsCheck:
    place = Place(store, plan, lambda: None, frozenset(keys), checker.shallow)

    def here(_: str, checks: Sequence[Check]) -> Iterator[Findings]:
        return (place.find(check) for check in checks)

    sums = SumsCheck(checker, plan, keys, here)
    place = replace(place, manifests=sums.manifests)
    sums.run()
    return sums


def check_second_passes(
    checker: Checker, run: Plan, there: Mapping[str, Window], keys: Collection[str], *, used: bool
) -> dict[str, tuple[str, SumsCheck]]:
    """Check the basis of the second pass and that of every window; returns of those that are begun the prefix and the sums.

    Args:
        checker: Of the verification.
        run: Plan of the run.
        there: Its windows by name.
        keys: All objects of the run.
        used: Whether there is a posterior, which is made of second passes.
    """
    key, found = layout.basis_key(run.further["name"]), {}
    basis = _check_basis(checker, run, key) if key in checker.keys or used else None
    for name, window in there.items():
        store = place_of_second(window.store, window.plan)
        prefix = store.url.removeprefix(checker.store.url).lstrip("/") + "/"
        if f"{prefix}{layout.PLAN}" not in checker.keys:
            if used and name == run.window_name and checker.missing(f"{prefix}{layout.PLAN}"):
                text = f"{prefix}{layout.PLAN} is missing, though the run has a posterior. Restore it from a copy, or start"
                checker.found.problem(f"{prefix}{layout.PLAN}", f"{text} again with --fresh.")
            continue
        sums = check_place(checker, run, prefix, store, keys)
        if sums is None:
            continue
        found[name], plan = (prefix, sums), sums.plan
        if basis is not None and (plan.basis or {}).get("sha256") != basis:
            text = f"{prefix}{layout.PLAN} is in another basis than {key}. {layout.remedy(key)}"
            checker.found.problem(f"{prefix}{layout.PLAN}", text)
        elif basis is not None and plan.digest != second_plan(window.plan, basis).digest:
            text = f"{prefix}{layout.PLAN} is not the plan of the second pass of this run. Restore it from a copy, or start"
            checker.found.problem(f"{prefix}{layout.PLAN}", f"{text} again with --fresh.")
        if used and name == run.window_name and not sums.dropped:
            _complete(checker, prefix, plan)
    return found


def _check_basis(checker: Checker, run: Plan, key: str) -> str | None:
    """Check the arrays of the basis, and that it was found from the sum of the first window; returns its digest."""
    manifest = checker.attempt(key, lambda: bases.read_manifest(checker.store, run))
    if manifest is None:
        return None
    checker.found.came_from(manifest)
    for name, place in manifest["factors"].items():
        checker.array(place["prefix"], name, place["entry"])
    summed = windows.find_window(checker.store, run) if layout.WINDOW in checker.keys else None
    if summed is not None and alone(checker.store, run, summed)[0].digest != manifest["of"]:
        checker.found.problem(
            key, f"{key} was found from another sum than that of {layout.WINDOW}. {layout.remedy(key)}"
        )
    return bases.digest_of(manifest)


def _complete(checker: Checker, prefix: str, plan: Plan) -> None:
    """Name the partials of the first window's second pass that are missing."""
    for unit in plan.units:
        key = prefix + layout.partial_key(unit.id)
        if checker.missing(key):
            text = (
                f"{key} is missing, though the run has a posterior. Run the fit job again: it recomputes that segment."
            )
            checker.found.problem(key, text)
