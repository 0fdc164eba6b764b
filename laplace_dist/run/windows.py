"""The window's sum: its partials added up part by part, each part under a manifest of its own, then one for all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import Any

import numpy as np

from laplace_dist.errors import CheckpointError, ForeignError, MissingObjectError, RunFailed, listed
from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run import partial_manifests, partials
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import PARTIALS, PARTS, WINDOW, attempt_prefix, owned, part_key, partial_key
from laplace_dist.run.ownership import commit, confirm
from laplace_dist.run.place import delete_owned
from laplace_dist.run.provenance import environment
from laplace_dist.run.readings import readings
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

SUM = "sum"  # name of a part's array
SAME_WEIGHT = 1e-9  # by which sums of weights may differ, relative: the order of addition is another one


def inputs_digest(manifests: Iterable[Mapping[str, Any]], part: Part) -> str:
    """Return what a part was summed from: the committed partials that hold any of it in plan order, by their bytes."""
    digest = hashlib.sha256()
    for manifest in partial_manifests.with_part(manifests, part):
        entry = partial_manifests.entries_of(manifest, part)
        digest.update(json.dumps([manifest["segment"], entry]).encode())
    return digest.hexdigest()


def sum_part(store: Store, plan: Plan, manifests: Sequence[Mapping[str, Any]], part: Part) -> np.ndarray:
    """Add one part of every partial in plan order, in float64.

    The pieces of each are added in place, entry by entry in the same order, so that the bits are those of `sum_in_order` over
    whole parts. Memory is the sum, a part of 32 MiB, and what `Store.read_pieces` holds: from a directory two pieces of 16 MiB,
    from an object store four, of which the one, or up to three, that are being decoded are there twice.

    Raises:
        CheckpointError: An array is missing, truncated or altered.
    """
    total = np.full(part.stop - part.start, -0.0)  # which any number is added to without a change, -0.0 too
    for pieces in partials.read_parts(store, plan, partial_manifests.with_part(manifests, part), part):
        partials.add(total, pieces)
    return total


def commit_part(store: Store, plan: Plan, part: Part, total: np.ndarray, of: str, made: Mapping[str, Any]) -> None:
    """Commit the sum of one part, unless it is there.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        part: The part.
        total: Its sum.
        of: `inputs_digest(...)`.
        made: Where it was made.
    """
    key = part_key(part.id)
    prefix = attempt_prefix(key, new_attempt())
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "plan": plan.digest,
        "of": of,
        "prefix": prefix,
        "arrays": store.write_arrays(prefix, {SUM: total}),
        "environment": dict(made),
    }
    if not commit(store, plan, key, manifest):
        store.delete_tree(prefix)
        read_part_manifest(store, plan, part, of)


def read_part_manifest(store: Store, plan: Plan, part: Part, of: str | None = None) -> dict[str, Any]:
    """Return the manifest of a part's sum.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        part: The part.
        of: `inputs_digest(...)` of the partials that are there now, if that is to be compared.

    Raises:
        MissingObjectError: It is not committed.
        CheckpointError: It is truncated, altered, of another plan, or the sum of other partials.
    """
    key = part_key(part.id)
    manifest = open_json(store.read(key), key)
    shape = manifest["arrays"][SUM]["shape"]
    if manifest["plan"] != plan.digest or shape != [part.stop - part.start]:
        kind = CheckpointError if manifest["plan"] == plan.digest else ForeignError
        raise kind(f"{key} does not belong to this run's plan. Delete it and run the same command again.")
    if of not in (None, manifest["of"]):
        raise CheckpointError(
            f"{key} is the sum of other partials than those that are committed now. Delete it and run the same command "
            "again: it sums that part anew."
        )
    return manifest


def missing_parts(store: Store, plan: Plan, manifests: Sequence[Mapping[str, Any]]) -> list[tuple[Part, str]]:
    """Return the parts that have no sum of these partials, each with `inputs_digest`; sums of others are deleted.

    A segment whose partial was bad, was deleted and computed again may have other bytes on other hardware; a part that was
    summed before that does not count.

    Raises:
        RunFailed: The module groups of a segment are of other data.
    """
    partial_manifests.check_agreement(plan, manifests)
    there, missing = set(store.list(PARTS, recursive=False)), []
    for part in plan.parts:
        of = inputs_digest(manifests, part)
        if part_key(part.id) in there:
            there_of = _of_part(store, plan, part)
            if there_of == of:
                continue
            if there_of is not None:
                store.delete_tree(part_key(part.id))
        missing.append((part, of))
    return missing


def _of_part(store: Store, plan: Plan, part: Part) -> str | None:
    """Return of what a committed part is the sum; None for one of another run, which makes way when this one is committed."""
    try:
        return read_part_manifest(store, plan, part)["of"]
    except ForeignError:
        return None


def commit_window(store: Store, plan: Plan, manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make the parts the window's sum, unless that is done, and return its manifest.

    Raises:
        CheckpointError: A part is not committed, bad, or the sum of other partials than these.
        RunFailed: The weights of the examples that were read are not those of the plan.
    """
    parts = {part.id: read_part_manifest(store, plan, part, inputs_digest(manifests, part)) for part in plan.parts}
    counted = partial_manifests.of_first_group(plan, manifests)
    check_weight(plan, counted)
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": plan.digest,
        "n_data": plan.n_data,
        "loss": total_loss(store, counted),
        "environment": environment("cpu"),
        "parts": {name: {"prefix": found["prefix"], "entry": found["arrays"][SUM]} for name, found in parts.items()},
        **readings(plan, manifests),
    }
    commit(store, plan, WINDOW, manifest)
    return read_window(store, plan)


def check_weight(plan: Plan, manifests: Sequence[Mapping[str, Any]]) -> None:
    """Look whether the weights that were read of all segments sum up to those that the plan was made with.

    Args:
        plan: Of the window.
        manifests: Of its partials, of one group of each segment.

    Raises:
        RunFailed: They do not; no node can be named, since only the sum is known.
    """
    if "weights" not in plan.data:
        return
    found, wanted = fsum(manifest["weight"] for manifest in manifests), plan.n_data
    if abs(found - wanted) > SAME_WEIGHT * wanted:
        nodes = sorted({manifest["environment"]["node"] for manifest in manifests})
        raise RunFailed(
            f"the weights of the examples that were read sum up to {found!r}, those that the plan was made with to {wanted!r}: "
            f"{listed(nodes)} have read others. Every node needs the same data: verify with --data names the segments; delete "
            "their manifests under partials, and run the same command again."
        )


def total_loss(store: Store, manifests: Iterable[Mapping[str, Any]]) -> float:
    """Return the summed loss of partials, of one group of each segment, rounded once."""
    return fsum(partials.loss_of(store, manifest) for manifest in manifests)


def read_window(store: Store, plan: Plan) -> dict[str, Any]:
    """Return the manifest of the window's sum.

    Raises:
        MissingObjectError: It is not committed.
        CheckpointError: It is truncated, altered or of another plan.
    """
    manifest = open_json(store.read(WINDOW), WINDOW)
    shapes = {name: place["entry"]["shape"] for name, place in manifest["parts"].items()}
    planned = {part.id: [part.stop - part.start] for part in plan.parts}
    said = len(manifest["read"]["made"]) if manifest.get("read") else len(plan.units)
    wanted = plan.digest, plan.n_data, planned, len(plan.units)
    if (manifest["plan"], manifest["n_data"], shapes, said) != wanted:
        raise (CheckpointError if manifest["plan"] == plan.digest else ForeignError)(
            f"{WINDOW} does not belong to this run's plan. Delete it and run the same command again: it puts the parts "
            "together anew."
        )
    return manifest


def check_arrays(store: Store, manifest: Mapping[str, Any]) -> None:
    """Read a window's sum once.

    Args:
        store: Of the window.
        manifest: Of its sum.

    Raises:
        CheckpointError: A part is missing, truncated or altered.
    """
    for place in manifest["parts"].values():
        store.read_array(place["prefix"], SUM, place["entry"])


def drop_partials(store: Store, plan: Plan) -> None:
    """Delete the partials of a window whose sum is committed, once that was read whole and says what they were made of.

    It says before anything goes that they are dropped, so that what a crash leaves of them counts for nobody.

    Args:
        store: Of the window.
        plan: Its plan.

    Raises:
        MissingObjectError: The sum is not committed.
        CheckpointError: It is truncated or altered; nothing is deleted.
    """
    if not any(owned(key) for key in store.list(PARTIALS)):
        return
    manifest = read_window(store, plan)
    if not manifest.get("dropped"):
        check_arrays(store, manifest)
        known = {} if manifest.get("read") else _known(store, plan)
        confirm(store, plan)
        store.replace(WINDOW, seal_json({**manifest, **known, "dropped": True}))
    delete_owned(store, PARTIALS)


def _known(store: Store, plan: Plan) -> dict[str, Any]:
    """Return what the sum of a window from before that was kept has to say of its partials, if they all are there."""
    wanted = {partial_key(unit.id) for unit in plan.units}
    if not wanted <= set(store.list(PARTIALS, recursive=False)):
        return {}
    return readings(plan, list(partial_manifests.manifests(store, plan)))


def is_dropped(store: Store, plan: Plan) -> bool:
    """Say whether a window's partials were dropped, so that none of them is missing."""
    found = find_window(store, plan)
    return found is not None and bool(found.get("dropped"))


def find_window(store: Store, plan: Plan) -> dict[str, Any] | None:
    """Return the manifest of the window's sum, or None where the reduction is not done."""
    try:
        return read_window(store, plan)
    except (MissingObjectError, ForeignError):
        return None
