"""Committed recalibrations, and which job is at one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import RECALIBRATION_LEASE, lease_key, recalibration_key
from laplace_dist.run.leases import Lease
from laplace_dist.run.ownership import confirm
from laplace_dist.run.provenance import node
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

SILENT_SECONDS = (
    600.0  # after which another job takes over: ten signs of life, and longer than any pause that is not the end
)
LOOK_SECONDS = 10.0  # between two looks at the sign of life of another job


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


def take(
    store: Store,
    lease: Lease,
    say: Callable[[str], None] = lambda text: None,
    wait: Callable[[float], None] = time.sleep,
) -> str | None:
    """Make a job the one that recalibrates, unless another one that lives is at it; returns the node of that one.

    A job lives if it renews its sign of life. Whether one that was killed a moment ago does cannot be told at once: this waits
    until its sign is renewed, ends, or is `SILENT_SECONDS` old on the storage's clock, and takes over in the last two cases.

    Args:
        store: The checkpoint.
        lease: The job's own sign of life, which is shown meanwhile.
        say: Where a line for people goes.
        wait: Lets so many seconds pass.
    """
    mine = seal_json({"format_version": FORMAT_VERSION, "job": lease.job, "node": node()})
    seen: tuple[str, datetime] | None = None
    while True:
        lease.show()
        if store.create(RECALIBRATION_LEASE, mine):
            return None
        try:
            content = store.read(RECALIBRATION_LEASE)
        except MissingObjectError:
            continue
        holder = open_json(content, RECALIBRATION_LEASE)
        if holder["job"] == lease.job:
            return None
        key = lease_key(holder["job"])
        shown = store.modified("jobs").get(key)
        if shown is None or (silent := (store.now() - shown).total_seconds()) >= SILENT_SECONDS:
            if store.swap(RECALIBRATION_LEASE, content, mine):
                return None
            continue
        if seen is not None and seen[0] == key and shown > seen[1]:
            return holder["node"]
        if seen is None or seen[0] != key:
            say(
                f"a recalibration on {holder['node']} has begun and not ended; waiting up to {SILENT_SECONDS - silent:.0f} s "
                "to see whether it lives"
            )
        seen = key, shown
        wait(LOOK_SECONDS)


def holds(store: Store, job: str) -> bool:
    """Say whether a job is still the one that recalibrates."""
    try:
        return open_json(store.read(RECALIBRATION_LEASE), RECALIBRATION_LEASE)["job"] == job
    except MissingObjectError:
        return False
