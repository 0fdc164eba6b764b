"""Committed recalibrations, and which job is at one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import RECALIBRATION_LEASE, lease_key, recalibration_key
from laplace_dist.run.ownership import confirm
from laplace_dist.run.provenance import node
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

SILENT_SECONDS = (
    600.0  # after which another job takes over: ten signs of life, and longer than any pause that is not the end
)


def read_decision(store: Store, plan: Plan, window: str) -> dict[str, Any] | None:
    """Return what the recalibration with a window has found, or None if there was none in this run.

    Raises:
        CheckpointError: It is truncated or altered.
    """
    key = recalibration_key(window)
    try:
        found = open_json(store.read(key), key)
    except MissingObjectError:
        return None
    return found if found["plan"] == plan.digest else None


def write_decision(store: Store, plan: Plan, window: str, values: Mapping[str, Any]) -> None:
    """Write what the recalibration with a window has found, over what one with other settings had found before."""
    confirm(store, plan)
    content = {"format_version": FORMAT_VERSION, "plan": plan.digest, "window": window, **values}
    store.replace(recalibration_key(window), seal_json(content))


def take(store: Store, job: str) -> str | None:
    """Make a job the one that recalibrates, unless another one that lives is at it; returns the node of that one.

    A job lives as long as its sign of life is younger than `SILENT_SECONDS`, on the storage's own clock.

    Args:
        store: The checkpoint.
        job: Id in the job's sign of life, which is shown already.
    """
    mine = seal_json({"format_version": FORMAT_VERSION, "job": job, "node": node()})
    if store.create(RECALIBRATION_LEASE, mine):
        return None
    try:
        content = store.read(RECALIBRATION_LEASE)
    except MissingObjectError:
        return take(store, job)
    holder = open_json(content, RECALIBRATION_LEASE)
    if holder["job"] == job or (not _lives(store, holder["job"]) and store.swap(RECALIBRATION_LEASE, content, mine)):
        return None
    return holder["node"]


def holds(store: Store, job: str) -> bool:
    """Say whether a job is still the one that recalibrates."""
    try:
        return open_json(store.read(RECALIBRATION_LEASE), RECALIBRATION_LEASE)["job"] == job
    except MissingObjectError:
        return False


def _lives(store: Store, job: str) -> bool:
    shown = store.modified().get(lease_key(job))
    return shown is not None and (store.now() - shown).total_seconds() < SILENT_SECONDS
