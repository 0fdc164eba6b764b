"""Commit the sums of one segment, and read them back: arrays under an attempt's own prefix, then one manifest.

What a manifest says, and what a `unit` is, is in `partial_manifests`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from laplace.structures.sums import is_finite
from laplace_dist.errors import RunFailed
from laplace_dist.plan.groups import Group
from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run.layout import LOSS, partial_key
from laplace_dist.run.ownership import commit
from laplace_dist.run.partial_manifests import check_same_data, planned_facts, read_manifest
from laplace_dist.run.vector import Vector, complete, overlaps, write
from laplace_dist.storage.pieces import Loaded
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Receipt:
    """What the driver hears of a commit.

    Attributes:
        segment: The unit's id, which is the segment's where there is one group.
        attempt: The id of the attempt that was committed, this one or the one that came first.
        won: Whether it was this one.
        bytes: Stored size of this attempt's arrays.
        seconds: Time that the commit took.
    """

    segment: str
    attempt: str
    won: bool
    bytes: int
    seconds: float


def commit_partial(
    store: Store,
    plan: Plan,
    unit: Segment,
    tensors: Mapping[str, torch.Tensor],
    n_data: float,
    attempt: str,
    *,
    data_sha256: str,
    environment: Mapping[str, Any],
    examples: Mapping[str, Any] | None = None,
) -> Receipt:
    """Make the sums of one unit part of the run, once, whoever else tries.

    The parts of the sums are written, flushed, read back and verified under `partials/<unit>/<attempt>/`; the manifest that
    names them is created only if there is none of this run. If there is one, the attempt id in it says who won, and the loser's
    arrays are deleted. A failure before that leaves nothing that a reader sees.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        unit: The segment, and the group of its sums, that was accumulated.
        tensors: Every factor of the group, as far as it is in it, and `loss` (0-d).
        n_data: Examples in the sums; of data with weights the sum of these.
        attempt: `new_attempt()`.
        data_sha256: Digest of the very batches that were read.
        environment: `provenance.environment(...)`.
        examples: Digests of the examples, as `plan.sketch.Sketch` gives them; None where batches cannot be taken apart.

    Raises:
        RunFailed: A sum is not finite, no space is left, or another attempt at the segment has read other data.
        CheckpointError: What was read back differs, or the existing manifest is bad.
        SettingsError: The run was deleted meanwhile, or is another one.
    """
    begun = time.perf_counter()
    assert re.fullmatch(r"[\w-]+", attempt), f"attempt id {attempt!r} must be one part of a key"
    weighted = "weights" in plan.data
    assert weighted or n_data == unit.stop - unit.start, f"segment {unit} cannot hold {n_data} examples"
    facts = planned_facts(plan, unit, attempt)
    entries = _write(store, plan, unit, tensors, facts["prefix"])
    manifest = {
        "format_version": FORMAT_VERSION,
        **facts,
        "attempt": attempt,
        **({"weight": float(n_data)} if weighted else {}),
        "arrays": entries,
        "loss": float(tensors[LOSS]),
        "data_sha256": data_sha256,
        "examples": None if examples is None else dict(examples),
        "environment": dict(environment),
    }
    winner = attempt
    if not commit(store, plan, partial_key(unit.id), manifest):
        first = read_manifest(store, plan, unit)
        winner = first["attempt"]
        if winner != attempt:
            store.delete_tree(facts["prefix"])
            check_same_data(first, data_sha256, environment["node"])
    size = sum(entry["stored_bytes"] for entry in entries.values())
    return Receipt(unit.id, winner, winner == attempt, size, time.perf_counter() - begun)


def _write(
    store: Store, plan: Plan, unit: Segment, tensors: Mapping[str, torch.Tensor], prefix: str
) -> dict[str, dict[str, Any]]:
    """Write the parts of a unit's sums under an attempt's prefix, and return what its manifest says of them."""
    group = plan.groups[unit.group]
    vector = Vector(group.places, _arrays(group, unit, tensors))
    held = ((part.id, group.overlap(part)) for part in plan.parts)
    try:
        return store.write_arrays(prefix, {name: vector.part(*own) for name, own in held if own is not None})
    except RunFailed:  # no space: give back what this attempt took
        store.delete_tree(prefix)
        raise


def loss_of(store: Store, manifest: Mapping[str, Any]) -> float:
    """Return the summed loss of a partial."""
    if manifest["format_version"] > 1:
        return manifest["loss"]
    return float(store.read_array(manifest["prefix"], LOSS, manifest["arrays"][LOSS]))


def read_parts(store: Store, plan: Plan, manifests: Sequence[Mapping[str, Any]], part: Part) -> Iterator[Loaded]:
    """Yield, for every partial in order, an iterator over the `(rows, piece)` of one part, as `Store.read_pieces` does."""
    if all(manifest["format_version"] > 1 for manifest in manifests):
        found = store.read_pieces((m["prefix"], part.id, m["arrays"][part.id]) for m in manifests)
        for manifest, pieces in zip(manifests, found, strict=True):
            start, _ = plan.groups[plan.units_by_id[manifest["segment"]].group].overlap(part)
            yield pieces if start == part.start else _further_on(pieces, start - part.start)
    else:
        for manifest in manifests:
            yield ((slice(None), read_part(store, plan, m, part)) for m in [manifest])


def _further_on(pieces: Loaded, by: int) -> Loaded:
    """Yield the pieces of an array that begins within a part, with their rows counted from the part's beginning."""
    for rows, piece in pieces:
        yield slice(rows.start + by, rows.stop + by), piece
        del piece  # before the next one is waited for


def add(total: np.ndarray, pieces: Loaded) -> None:
    """Add the pieces of one array to a sum, in place; where that raises, the sum is worth nothing any more."""
    for rows, piece in pieces:
        total[rows] += piece
        del piece  # before the next one is waited for


def read_part(store: Store, plan: Plan, manifest: Mapping[str, Any], part: Part) -> np.ndarray:
    """Return one part of a committed partial, after verifying every byte of it.

    Raises:
        CheckpointError: Something is missing, truncated or altered.
    """
    prefix, entries = manifest["prefix"], manifest["arrays"]
    if manifest["format_version"] > 1:
        return store.read_array(prefix, part.id, entries[part.id])
    names = [place.name for place, _, _ in overlaps(plan.places, part.start, part.stop)]
    arrays = {name: store.read_array(prefix, name, entries[name]) for name in names}
    return Vector(plan.places, arrays).read(part.start, part.stop)


def read_factors(store: Store, plan: Plan, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the factors of a committed partial of all factors by name, float64, after verifying every byte of them.

    Raises:
        CheckpointError: Something is missing, truncated or altered.
    """
    found = {place.name: np.empty(place.shape) for place in plan.places}
    for part in plan.parts:
        write(plan.places, found, part.start, read_part(store, plan, manifest, part))
    complete(plan.places, found)
    return found


def _arrays(group: Group, unit: Segment, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the tensors as arrays, finite and of the planned names and shapes."""
    planned = group.shapes
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != LOSS}
    assert given == planned, f"sums hold {given}, the plan says {planned}"
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise RunFailed(
                f"segment {unit.id} (examples {unit.start} to {unit.stop - 1}): the sum {name!r} is not "
                "finite, so nothing was committed. Values this large overflow: scale the data, or compute in float64."
            )
    return {name: tensors[name].detach().cpu().numpy() for name in planned}
