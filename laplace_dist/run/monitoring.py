"""What is kept of the watch for drift between recalibrations, and which evaluation it compares with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run import evaluations, pointer
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import DRIFT, EVALUATIONS
from laplace_dist.run.ownership import confirm, has
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store


def read_state(store: Store, plan: Plan) -> dict[str, Any] | None:
    """Return what is kept, or None where nothing is.

    Raises:
        CheckpointError: It is truncated or altered.
    """
    try:
        found = open_json(store.read(DRIFT), DRIFT)
    except MissingObjectError:
        return None
    return found if found["plan"] == plan.digest else None


def write_state(store: Store, plan: Plan, state: Mapping[str, Any]) -> None:
    """Keep a state in place of the one before."""
    confirm(store, plan)
    store.replace(DRIFT, seal_json({**state, "format_version": FORMAT_VERSION, "plan": plan.digest}))


def evaluation_of(store: Store, plan: Plan, current: Mapping[str, Any]) -> str | None:
    """Return the evaluation by which the current posterior was accepted; None if it is gone, or has nothing that is watched.

    Of several entries of the history that follow each other, as where a window was dropped that it is not made of, the first.

    Args:
        store: The checkpoint.
        plan: Of the run.
        current: `CURRENT.json`.
    """
    own = current["version"], current["tuning"]
    entries = takewhile(lambda e: (e["version"], e["tuning"]) == own, reversed(pointer.history_of(current)))
    accepted = [entry["evaluation"] for entry in entries if entry.get("evaluation")]
    key = accepted[-1] if accepted else evaluations.shown(store)
    if key is None or not key.startswith(f"{EVALUATIONS}/{current['version']}-") or not has(store, plan, key):
        return None
    same = open_json(store.read(key), key)["settings"].get("tuning") == current["tuning"]
    return key if same and evaluations.is_watched(store, key) else None


def reference(
    state: Mapping[str, Any] | None, current: Mapping[str, Any], accepted: str | None, fresh: str
) -> dict[str, Any]:
    """Return the state to go on with: the one that is there, or the beginning of one with another reference.

    Args:
        state: The one that is there, or None.
        current: `CURRENT.json`.
        accepted: `evaluation_of(...)`.
        fresh: Key of the current posterior's evaluation on the fresh data, the reference where there is no other.
    """
    own = {name: current[name] for name in ("version", "tuning")}
    begun = state is not None and bool(state["streams"])
    if begun and own == {name: state[name] for name in own} and accepted in (None, state["evaluation"]):
        return dict(state)
    number = 1 if state is None else state["number"] + begun
    beginning = {"streams": {}, "distance": None, "noticed": {}, "seen": [], "last": None}
    return {**own, "number": number, "evaluation": accepted or fresh, **beginning}
