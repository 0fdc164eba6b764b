"""The part of a verification that is about second passes, in the eigenbases of posterior versions."""

from __future__ import annotations

from collections.abc import Collection

from laplace_dist.plan.plan import Plan
from laplace_dist.run import layout, moments
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.findings import Checker
from laplace_dist.run.verify_windows import check_place


def check_moments(checker: Checker, plan: Plan, keys: Collection[str], store: Checkpoint) -> None:
    """Check every second pass as a run of its own, its eigenbasis, and that the current version has one.

    Args:
        checker: Of the verification.
        plan: Of the run.
        keys: All objects.
        store: The checkpoint.
    """
    inside = [key for key in keys if key.startswith(f"{layout.MOMENTS}/")]
    for version in sorted({key.split("/")[1] for key in inside}):
        prefix = f"{layout.MOMENTS}/{version}/"
        found = check_place(checker, plan, prefix, moments.place_of(store, version), keys)
        if found is not None:
            checker.attempt(f"{prefix}{layout.PLAN}", lambda v=version: moments.read_pass(store, plan, v))
    if plan.is_corrected and layout.CURRENT in keys:
        current = checker.attempt(layout.CURRENT, lambda: open_json(store.read(layout.CURRENT), layout.CURRENT))
        key = current and f"{layout.MOMENTS}/{current['version']}/{layout.WINDOW}"
        if key and checker.missing(key):
            checker.found.problem(key, f"{key} is missing, and its version is current. Run the fit job again.")
