"""The history of a run's posterior by window: what was compared, what was promoted, and drift where it is watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.combination import Window, windows_of
from laplace_dist.run.layout import RECALIBRATIONS
from laplace_dist.storage.store import Store

MOST = 400  # lines of what else is known of drift


def decisions(store: Store, plan: Plan) -> list[dict[str, Any]]:
    """Return what the recalibrations of a run have found, the oldest first, each with the time under `at`.

    One that is damaged is left out here: a verification names it.
    """
    times = {key: time for key, time in store.modified(RECALIBRATIONS).items() if key.endswith("/decision.json")}
    found = []
    for key, time in sorted(times.items(), key=lambda item: (item[1], item[0])):
        try:
            values = open_json(store.read(key), key)
        except (CheckpointError, SettingsError):
            continue
        if values["plan"] == plan.digest:
            found.append({**values, "at": time.isoformat(timespec="seconds")})
    return found


def history(store: Store, plan: Plan, current: Mapping[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return windows, recalibrations, and what was current when.

    Args:
        store: The checkpoint.
        plan: Of the run.
        current: `CURRENT.json`.
        found: `decisions(...)`.
    """
    names = ("window", "at", "promoted", "why", "metrics", "differences")
    return {
        "windows": [_window(window) for window in windows_of(store, plan)],
        "recalibrations": [
            {**{name: decision[name] for name in names}, "drift": _drift(decision.get("drift"))} for decision in found
        ],
        "current": list(current.get("history") or []),
    }


def _window(window: Window) -> dict[str, Any]:
    """Return its name and number of examples, and the sum of their weights where they have any."""
    plan = window.plan
    weights = {"sum_of_weights": plan.n_data} if "weights" in plan.data else {}
    return {"window": window.name, "examples": plan.n_examples, **weights}


def _drift(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what is known of drift: the streams that are watched, what was noticed, and everything else line by line."""
    if not record:
        return None
    streams = record.get("streams") or {}
    over = record.get("passed_over") or {}
    rest = {name: value for name, value in record.items() if name not in ("streams", "noticed")}
    return {
        "streams": [{"stream": name, **values, "passed_over": over.get(name)} for name, values in streams.items()],
        "noticed": dict(record.get("noticed") or {}),
        "rest": list(_flat(rest))[:MOST],
    }


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(path, value)` for every plain value of nested mappings and lists."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{name} · {key}" if name else str(key))
    elif isinstance(values, list) and any(isinstance(value, dict | list) for value in values):
        for place, value in enumerate(values):
            yield from _flat(value, f"{name} · {place + 1}")
    elif values is not None:
        yield name, values
