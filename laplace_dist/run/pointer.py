"""Which posterior version is current, which tuning is in force, and how it came to that."""

from __future__ import annotations

from typing import Any

from laplace_dist.errors import CheckpointError, MissingObjectError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import CURRENT
from laplace_dist.run.ownership import confirm
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store


def read_current(store: Store) -> dict[str, Any]:
    """Return which posterior version is current, under `version`, and the key of its tuning or None, under `tuning`.

    Raises:
        MissingObjectError: No posterior version has been committed.
        CheckpointError: It is truncated or altered.
    """
    try:
        current = open_json(store.read(CURRENT), CURRENT)
    except MissingObjectError as error:
        raise MissingObjectError(
            f"{store.url}/{CURRENT} is missing: this run has no posterior yet. Run its fit job to the end."
        ) from error
    if current["tuning"] is not None and not current["tuning"].startswith(f"tuning/{current['version']}-"):
        raise CheckpointError(
            f"{CURRENT} is altered: {current['tuning']} is no tuning of version {current['version']}. Delete it and run "
            "the fit job again."
        )
    return current


def tuning_of(store: Store) -> str | None:
    """Return the key of the tuning that is in force, or None where there is none.

    Raises:
        CheckpointError: What says so is truncated or altered.
    """
    try:
        return read_current(store)["tuning"]
    except MissingObjectError:
        return None


def write_current(store: Store, plan: Plan, version: str, tuning: str | None, *, first: bool = False) -> None:
    """Make a posterior version current, with the tuning that belongs to it.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        version: Name of the posterior version.
        tuning: Key of a tuning, or None.
        first: Only if none is current yet, so that another driver's tuning of the same version stays in force.

    Raises:
        SettingsError: The run was deleted meanwhile, or is another one.
    """
    content = {"format_version": FORMAT_VERSION, "version": version, "tuning": tuning}
    confirm(store, plan)
    if first:
        store.create(CURRENT, seal_json(content))
        return
    if history := _history(store):
        content["history"] = [*history, {"version": version, "tuning": tuning, "why": "tuned"}]
    store.replace(CURRENT, seal_json(content))


def _history(store: Store) -> list[dict[str, Any]]:
    try:
        return read_current(store).get("history") or []
    except MissingObjectError:
        return []


def promote(store: Store, plan: Plan, before: bytes, version: str, tuning: str | None, why: str) -> bool:
    """Make a posterior version current if nobody has changed what is current meanwhile, and keep the history.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        before: The bytes of `CURRENT.json` on which the decision rests.
        version: Name of the posterior version.
        tuning: Key of its tuning, or None.
        why: In a person's words.

    Returns:
        Whether it was done; False if another job was first.

    Raises:
        SettingsError: The run was deleted meanwhile, or is another one; or the storage cannot compare and set.
    """
    old = open_json(before, CURRENT)
    first = {"version": old["version"], "tuning": old["tuning"], "why": "the first"}
    history = [*(old.get("history") or [first]), {"version": version, "tuning": tuning, "why": why}]
    content = {"format_version": FORMAT_VERSION, "version": version, "tuning": tuning, "history": history}
    confirm(store, plan)
    return store.swap(CURRENT, before, seal_json(content))
