"""Whose a run is: what commits looks first whether the plan is still its own, and what another run left does not count.

`--fresh` deletes a run while workers of it may still be at work. Each stops itself before it commits: it reads the plan again.
An object store has no way to do both at once, so one manifest may still land in the next run; it carries the digest of its own
plan, so whoever finds it there knows that it does not count, and a worker of the run puts its own in that place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError, StorageError
from laplace_dist.plan.plan import Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import PLAN
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

ATTEMPTS = 10  # at a manifest that others delete or replace at that very moment


def read_plan(store: Store) -> Plan:
    """Return the plan of an existing run.

    Raises:
        MissingObjectError: There is no run.
        SettingsError: It was written by a newer version.
        CheckpointError: It was truncated or altered.
    """
    try:
        return _parsed(store.read(PLAN))
    except MissingObjectError as error:
        raise MissingObjectError(
            f"there is no run at {store.url!r} (no {PLAN}); expected a checkpoint that a fit job has started"
        ) from error


def refuse_no_run(store: Store) -> None:
    """Refuse a place that holds no run, in the words of a person who has mistyped it.

    Raises:
        SettingsError: There is no plan.
    """
    if not store.exists(PLAN):
        raise SettingsError(
            f"--checkpoint: got {store.url!r}, where there is no run; expected one that a fit job has started"
        )


@contextmanager
def of_the_plan() -> Iterator[None]:
    """Say that the plan was altered where it does not hold what the block takes from it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{PLAN} names settings or factors that make no posterior of this model ({type(error).__name__}: {error}): it "
            "was altered. Restore it from a copy, or start again with --fresh."
        ) from error


@lru_cache(maxsize=4)  # a worker reads the same plan again before each of its commits
def _parsed(data: bytes) -> Plan:
    return Plan.from_values(open_json(data, PLAN))


def confirm(store: Store, plan: Plan) -> None:
    """Look that the run at the checkpoint is still the one with this plan.

    Raises:
        SettingsError: It was deleted, or is another one.
    """
    try:
        stored = read_plan(store).digest
    except MissingObjectError as error:
        raise SettingsError(
            f"--checkpoint {store.url!r} holds no run any more: another job has deleted it meanwhile (--fresh). This job stops."
        ) from error
    same(store, stored, plan.digest)


def same(store: Store, stored: str, own: str) -> None:
    """Compare the digest of the plan at the checkpoint with a job's own.

    Raises:
        SettingsError: They differ.
    """
    if stored != own:
        raise SettingsError(
            f"--checkpoint {store.url!r} holds the run of plan {stored[:12]}, and this job's is {own[:12]}: another job has "
            "begun a run there meanwhile (--fresh). This job stops; give it another --checkpoint."
        )


def is_foreign(data: bytes, key: str, plan: Plan) -> bool:
    """Say whether the bytes of a manifest are whole and of another plan.

    Raises:
        SettingsError: A newer version wrote it.
        CheckpointError: It was truncated or altered.
    """
    return of_another(open_json(data, key), plan)


def of_another(manifest: Mapping[str, Any], plan: Plan) -> bool:
    """Say whether a manifest is of another plan; one that names none, as in 0.1, is the run's."""
    return manifest.get("plan", plan.digest) != plan.digest


def has(store: Store, plan: Plan, key: str) -> bool:
    """Say whether a manifest is there and of this run.

    Raises:
        SettingsError: A newer version wrote it.
        CheckpointError: It was truncated or altered.
    """
    try:
        return not is_foreign(store.read(key), key, plan)
    except MissingObjectError:
        return False


def commit(store: Store, plan: Plan, key: str, values: Mapping[str, Any]) -> bool:
    """Create a manifest of the run, unless there is one; one of another run makes way.

    It is replaced and not deleted, so that nothing is gone that somebody has put there meanwhile.

    Args:
        store: The checkpoint.
        plan: Of the run.
        key: Of the manifest.
        values: The manifest.

    Returns:
        Whether what is stored is this one.

    Raises:
        SettingsError: The run was deleted, or is another one.
        CheckpointError: The manifest that is there is truncated or altered.
    """
    data = seal_json(values)
    for _ in range(ATTEMPTS):
        confirm(store, plan)
        if store.create(key, data):
            return True
        try:
            stored = store.read(key)
        except MissingObjectError:
            continue
        if stored == data or not is_foreign(stored, key, plan):
            return stored == data
        confirm(store, plan)
        store.replace(key, data)
    raise StorageError(f"{store.url}/{key}: others replace or delete it all the time. Run the same command again.")
