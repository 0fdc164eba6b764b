"""The second pass over a window's data, of structures that take two: where it lies, and beginning it.

It is laid out like a window, under `passes/<name>/` of the window: a plan, partials, parts, a sum. Its plan is the window's but
for the sums that it is of and the digest of the committed basis that they are expressed in, so no sum of another basis can be
added, and the window's own sum is that of the first pass. The posterior is made of second sums alone: windows after the first
are begun in the same basis and need no first pass, and their sums add.
"""

from __future__ import annotations

from dataclasses import replace

from laplace_dist.errors import SettingsError
from laplace_dist.plan.plan import Plan, differences
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.layout import PASSES, PLAN, basis_key
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.sealed_json import seal_json


def place_of_second(store: Checkpoint, plan: Plan) -> Checkpoint:
    """Return the store of a window's second pass.

    Args:
        store: Of the window.
        plan: Its plan, which names the second pass.
    """
    return store.under(f"{PASSES}/{plan.further['name']}")


def second_plan(plan: Plan, basis: str) -> Plan:
    """Return the plan of a window's second pass.

    Args:
        plan: Of the window.
        basis: Digest of the committed basis.
    """
    own = {"name": plan.further["name"], "sha256": basis}
    window = {"name": plan.window_name, "number": plan.window_number}
    return replace(plan, spec=plan.further["spec"], further=None, basis=own, run=plan.run_id, window=window)


def read_second_plan(place: Checkpoint, plan: Plan) -> Plan | None:
    """Return the plan of a second pass that was begun; None for what a deleted run has left.

    Raises:
        MissingObjectError: It was not begun.
        CheckpointError: It is truncated or altered.
    """
    found = read_plan(place)
    own = found.run == plan.run_id and found.window_name == plan.window_name and found.basis is not None
    return found if own else None


def open_second(place: Checkpoint, plan: Plan, basis: str) -> Plan:
    """Begin the second pass of a window, or continue it; returns its plan.

    Args:
        place: `place_of_second(...)`.
        plan: Of the window.
        basis: Digest of the committed basis.

    Raises:
        SettingsError: It was begun in another basis, or with another plan.
        CheckpointError: Its plan is truncated or altered.
    """
    wanted = second_plan(plan, basis)
    if place.create(PLAN, seal_json(wanted.to_values())):
        return wanted
    stored = read_second_plan(place, plan)
    if stored is None:
        place.replace(PLAN, seal_json(wanted.to_values()))
        return wanted
    if stored.digest != wanted.digest:
        name, found = plan.further["name"], differences(stored, wanted)
        other = f"basis: stored {stored.basis['sha256']!r}, now {basis!r}" if stored.basis != wanted.basis else ""
        raise SettingsError(
            f"{place.url}/{PLAN}: the second pass was begun in another basis or plan than that of now:\n  "
            + "\n  ".join([other] * bool(other) + found)
            + f"\nRestore {basis_key(name)} from a copy, or delete {place.url} and what was made of it (posteriors/, tuning/, "
            "evaluation/, CURRENT.json) and run the same command again: it does the second pass anew."
        )
    return stored
