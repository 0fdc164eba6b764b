"""Whose a run is: who commits looks first whether the run at the checkpoint is still its own.

`--fresh` deletes a run while workers of it may still be at work. Each of them stops itself before it commits: it reads the plan
again. An object store has no way to do both at once, so that a manifest may still land in the next run in the moment between;
it carries the digest of its own plan, so whoever finds it there knows that it does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laplace_dist.errors import MissingObjectError, SettingsError
from laplace_dist.plan.plan import Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import PLAN
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store


def read_plan(store: Store) -> Plan:
    """Return the plan of an existing run.

    Raises:
        MissingObjectError: There is no run.
        SettingsError: It was written by a newer version.
        CheckpointError: It was truncated or altered.
    """
    return Plan.from_values(open_json(store.read(PLAN), PLAN))


def confirm(store: Store, plan: str) -> None:
    """Look that the run at the checkpoint is still the one with this plan.

    Args:
        store: The checkpoint.
        plan: Digest of the job's own plan.

    Raises:
        SettingsError: It was deleted, or is another one.
    """
    try:
        stored = read_plan(store).digest
    except MissingObjectError as error:
        raise SettingsError(
            f"--checkpoint {store.url!r} holds no run any more: another job has deleted it meanwhile (--fresh). This job stops."
        ) from error
    same(store, stored, plan)


def same(store: Store, stored: str, plan: str) -> None:
    """Compare the digest of the plan that was found at the checkpoint with that of the job's own.

    Raises:
        SettingsError: They differ.
    """
    if stored != plan:
        raise SettingsError(
            f"--checkpoint {store.url!r} holds the run of plan {stored[:12]}, and this job's is {plan[:12]}: another job has "
            "begun a run there meanwhile (--fresh). This job stops; give it another --checkpoint."
        )


def commit(store: Store, plan: Plan, key: str, values: Mapping[str, Any]) -> bool:
    """Create a manifest of the run, unless there is one; one that a worker of a deleted run has left there makes way.

    It is replaced and not deleted, so that nothing is gone that somebody has put there meanwhile: what replaces it is of this
    run, and says the same as any other attempt of this run would.

    Args:
        store: The checkpoint.
        plan: Of the run.
        key: Of the manifest.
        values: The manifest; its `plan` is the digest of the plan.

    Returns:
        Whether what is stored is this one.

    Raises:
        SettingsError: The run was deleted, or is another one.
        CheckpointError: The manifest that is there is truncated or altered.
    """
    confirm(store, plan.digest)
    data = seal_json(values)
    if store.create(key, data):
        return True
    if not is_foreign(store.read(key), key, plan):
        return False
    confirm(store, plan.digest)
    store.replace(key, data)
    return store.read(key) == data


def is_foreign(data: bytes, key: str, plan: Plan) -> bool:
    """Say whether a manifest is whole and of another plan.

    Raises:
        SettingsError: A newer version wrote it.
        CheckpointError: It was truncated or altered.
    """
    return open_json(data, key)["plan"] != plan.digest
