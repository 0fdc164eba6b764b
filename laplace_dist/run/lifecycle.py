"""A run as a whole: opening, continuing, clearing it, and saying how far it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from laplace_dist.config.command_line import parse_yaml
from laplace_dist.config.settings import Config
from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.plan.plan import Plan, differences
from laplace_dist.plan.segments import Segment
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.layout import CONFIG, CURRENT, FOLLOW_ON, PLAN, VERSIONED, WEIGHTS, partial_key
from laplace_dist.run.partials import parse_manifest
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


def open_run(store: Store, plan: Plan, *, weights: Callable[[], bytes], config_yaml: str, fresh: bool = False) -> bool:
    """Start a run, or continue the one that is there if it has the same plan.

    Args:
        store: The checkpoint.
        plan: What this command asks for.
        weights: Returns the model's weights as a safetensors file; called if they are not stored yet.
        config_yaml: Snapshot of the settings, without secrets.
        fresh: Delete an existing run first.

    Returns:
        True if it continues an existing run.

    Raises:
        SettingsError: The location cannot be written to; or the run there has another plan, and every field that
            differs is named with both values; or a newer version wrote it.
    """
    store.check_writable()
    if fresh:
        clear(store)
    created = not store.exists(PLAN) and store.create(PLAN, seal_json(plan.to_values()))
    stored = plan if created else read_plan(store)
    if stored.digest != plan.digest:
        changed = "\n  ".join(differences(stored, plan))
        raise SettingsError(
            f"--checkpoint {store.url!r} holds a run with another plan:\n  {changed}\n"
            "Restore these, give another --checkpoint, or delete that run with --fresh."
        )
    if not store.exists(WEIGHTS):
        store.create(WEIGHTS, weights())
    store.replace(CONFIG, _seal_yaml(config_yaml))
    return not created


# Readers follow CURRENT to manifests to arrays, so `clear` deletes in that order and the plan last: if it is
# interrupted, what remains is still a run.
_SEAL = "# sha256 of the above: "


def _seal_yaml(text: str) -> bytes:
    """Return YAML with its own sha256 in a comment at the end."""
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def read_config(store: Store) -> dict[str, Any]:
    """Return the settings that the run keeps, by the names of the flags.

    Raises:
        MissingObjectError: They are not there.
        CheckpointError: They were truncated or altered.
    """
    content = store.read(CONFIG)
    text, mark, _ = content.decode(errors="replace").rpartition(_SEAL)
    remedy = "Run the fit job again: it writes it anew."
    if not mark or _seal_yaml(text) != content:
        raise CheckpointError(f"{CONFIG} is truncated or altered: its content does not have the sha256 in it. {remedy}")
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG} was altered: it {error}. {remedy}") from None
    names = {field.replace("_", "-") for field in Config.model_fields}
    if not isinstance(values, dict) or not values.keys() <= names:
        raise CheckpointError(f"{CONFIG} was altered: it does not hold the settings of a run. {remedy}")
    return values


def committed(store: Store, plan: Plan, *, arrays: bool = True) -> dict[str, dict[str, Any]]:
    """Return the manifests of the committed segments by id, in plan order, each checked against the plan.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        arrays: Keep the entries of the arrays, which `read_factor` needs; without them the result is small.

    Raises:
        CheckpointError: A manifest is truncated, altered, of another plan, or of a segment that the plan has not.
    """
    keys = {partial_key(segment.id): segment for segment in plan.segments}
    present = [key for key in store.list("partials", recursive=False) if key.endswith(".json")]
    for key in present:
        if key not in keys:
            raise CheckpointError(
                f"{store.url}/{key} is of no segment of this plan ({len(keys)} segments). "
                "Delete it, or start again with --fresh."
            )
    found = {}
    for key, data in store.read_many(present):
        manifest = parse_manifest(data, plan, keys[key])
        if not arrays:
            del manifest["arrays"]
        found[keys[key].id] = manifest
    return found


def remaining(plan: Plan, committed: Collection[str] | Mapping[str, Any]) -> list[Segment]:
    """Return the segments of the plan that are not among the committed ids, in plan order."""
    return [segment for segment in plan.segments if segment.id not in committed]


def clear(store: Store) -> None:
    """Delete the run under a checkpoint URL: only what the layout names, and in an order that can be interrupted."""
    store.delete_tree(CURRENT)
    for name in FOLLOW_ON:
        store.delete_tree(name)
    for folder in VERSIONED:
        for key in store.list(folder, recursive=False):
            store.delete_tree(key)
        store.delete_tree(folder)
    for name in (CONFIG, WEIGHTS, PLAN):
        store.delete_tree(name)


def status(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say how far the run at a checkpoint URL is.

    Returns:
        `url`, `plan` (digest), `examples`, `examples_committed`, `segments`, `segments_committed`, `complete`, and
        `posterior`: whether a posterior version is current.

    Raises:
        MissingObjectError: There is no run.
        CheckpointError: Part of it is truncated or altered.
    """
    store = Checkpoint(url, storage_options)
    plan = read_plan(store)
    done = committed(store, plan, arrays=False)
    return {
        "url": store.url,
        "plan": plan.digest,
        "examples": plan.n_examples,
        "examples_committed": sum(manifest["n_data"] for manifest in done.values()),
        "segments": len(plan.segments),
        "segments_committed": len(done),
        "complete": len(done) == len(plan.segments),
        "posterior": store.exists(CURRENT),
    }
