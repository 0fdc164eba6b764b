"""Commit the sums of one segment, and read them back: arrays under an attempt's own prefix, then one manifest.

Where a run has several module groups there is one partial for each group of a segment, which holds the group's entries of the
parts and has the segment's loss and number of examples, like those of the other groups. A `unit` is what a partial is of: a
segment and a group.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from laplace.structures.sums import is_finite
from laplace_dist.errors import CheckpointError, ForeignError, RunFailed, listed
from laplace_dist.plan.groups import Group
from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import LOSS, partial_key
from laplace_dist.run.ownership import commit
from laplace_dist.run.vector import Vector, complete, overlaps, write
from laplace_dist.storage.keys import check_key
from laplace_dist.storage.pieces import Loaded
from laplace_dist.storage.store import Store

# By which the losses of a segment's groups may differ, relative: their passes may be on unlike hardware.
SAME_LOSS = 1e-3


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
    group = plan.groups[unit.group]
    vector = Vector(group.places, _arrays(group, unit, tensors))
    prefix = f"partials/{unit.id}/{attempt}"
    held = ((part.id, group.overlap(part)) for part in plan.parts)
    try:
        entries = store.write_arrays(prefix, {name: vector.part(*own) for name, own in held if own is not None})
    except RunFailed:  # no space: give back what this attempt took
        store.delete_tree(prefix)
        raise
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": plan.digest,
        "segment": unit.id,
        "start": unit.start,
        "stop": unit.stop,
        "attempt": attempt,
        "n_data": unit.stop - unit.start,
        **({"weight": float(n_data)} if weighted else {}),
        "prefix": prefix,
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
            store.delete_tree(prefix)
            check_same_data(first, data_sha256, environment["node"])
    size = sum(entry["stored_bytes"] for entry in entries.values())
    return Receipt(unit.id, winner, winner == attempt, size, time.perf_counter() - begun)


def check_same_data(manifest: Mapping[str, Any], data_sha256: str, node: str) -> None:
    """Compare the data that a committed attempt has read with what was read of the segment here.

    Args:
        manifest: Of the committed attempt; one of 0.1 has no digest to compare with.
        data_sha256: Digest of the batches as they were read here.
        node: Name of this machine.

    Raises:
        RunFailed: They differ; names the segment and both nodes.
    """
    if manifest.get("data_sha256") in (None, data_sha256):
        return
    raise RunFailed(
        f"segment {manifest['segment']} (examples {manifest['start']} to {manifest['stop'] - 1}): node "
        f"{manifest['environment']['node']}, whose attempt is committed, has read other data than node {node}. Every node "
        "needs the same data, and reading it again must give the same examples. Find out which node is right: if it is "
        f"{node}, delete {partial_key(manifest['segment'])}; remove the cause and run the same command again."
    )


def read_manifest(store: Store, plan: Plan, unit: Segment) -> dict[str, Any]:
    """Return the manifest of a committed unit, checked against the plan.

    Raises:
        MissingObjectError: The unit is not committed.
        CheckpointError: The manifest is truncated, altered, or of another plan or unit.
        SettingsError: It was written by a newer version.
    """
    key = partial_key(unit.id)
    return parse_manifest(store.read(key), plan, unit)


def parse_manifest(data: bytes, plan: Plan, unit: Segment) -> dict[str, Any]:
    """Check a manifest's bytes against the plan, as `read_manifest` does, and return it."""
    return check_manifest(open_json(data, partial_key(unit.id)), plan, unit)


def check_manifest(manifest: dict[str, Any], plan: Plan, unit: Segment) -> dict[str, Any]:
    """Check an opened manifest against the plan, as `read_manifest` does, and return it."""
    key = partial_key(unit.id)
    wanted = {
        "plan": plan.digest,
        "segment": unit.id,
        "start": unit.start,
        "stop": unit.stop,
        "n_data": unit.stop - unit.start,
        "prefix": f"partials/{unit.id}/{manifest.get('attempt')}",
    }
    if "weights" not in plan.data:
        wanted["weight"] = None
    elif manifest.get("weight") is None:
        wanted["weight"] = "the sum of the examples' weights"
    for field, value in wanted.items():
        if manifest.get(field) != value:
            raise (ForeignError if field == "plan" else CheckpointError)(
                f"{key} does not belong to this run: its {field} is {manifest.get(field)!r}, expected {value!r}. "
                "Delete it to have the segment recomputed, or start again with --fresh."
            )
    check_key(manifest["prefix"])
    named = {name: list(entry["shape"]) for name, entry in manifest["arrays"].items() if name != LOSS}
    planned = _planned_arrays(plan, plan.groups[unit.group], manifest["format_version"])
    if named != planned:
        odd = sorted(name for name in named.keys() | planned.keys() if named.get(name) != planned.get(name))
        raise CheckpointError(
            f"{key} does not name the arrays of the plan; it differs in {', '.join(odd[:5])}. Delete it "
            "to have the segment recomputed, or start again with --fresh."
        )
    refuse_emptied(manifest["arrays"], manifest["format_version"], key, "Delete it to have the segment recomputed.")
    return manifest


def _planned_arrays(plan: Plan, group: Group, format_version: int) -> dict[str, list[int]]:
    """Return the shapes of the arrays of a partial: since format 2 its parts, before that its factors."""
    if format_version > 1:
        held = {part.id: group.overlap(part) for part in plan.parts}
        return {name: [own[1] - own[0]] for name, own in held.items() if own is not None}
    return {name: list(factor["shape"]) for name, factor in plan.spec["factors"].items()}


def refuse_emptied(arrays: Mapping[str, Mapping[str, Any]], format_version: int, key: str, remedy: str) -> None:
    """Refuse what 0.1 wrote of symmetric factors of one entry: it emptied them.

    Raises:
        CheckpointError: Naming the object and the factors.
    """
    emptied = [name for name, entry in arrays.items() if entry["packed"] and entry["shape"][-1] == 1]
    if format_version == 1 and emptied:
        raise CheckpointError(
            f"{key} was written by laplace_dist 0.1, which stored every symmetric factor of one entry as zero: "
            f"{listed(emptied)}. {remedy}"
        )


def units_of(plan: Plan, part: Part) -> list[Segment]:
    """Return the units that hold anything of a part, in plan order."""
    there = {group.number for group in plan.groups if group.overlap(part) is not None}
    return [unit for unit in plan.units if unit.group in there]


def manifests(store: Store, plan: Plan, part: Part | None = None) -> Iterator[dict[str, Any]]:
    """Yield the manifest of every unit in plan order, one at a time, each checked against the plan.

    Args:
        store: Of the window.
        plan: Its plan.
        part: Yield those alone that hold anything of this part, and what they say of it.

    Raises:
        MissingObjectError: A unit is not committed.
        CheckpointError: A manifest is truncated, altered or of another plan.
    """
    units = plan.units if part is None else units_of(plan, part)
    found = store.read_many([partial_key(unit.id) for unit in units])
    for unit, (_, data) in zip(units, found, strict=True):
        manifest = parse_manifest(data, plan, unit)
        yield manifest if part is None else of_part(manifest, part)


def with_part(manifests: Iterable[Mapping[str, Any]], part: Part) -> list[Mapping[str, Any]]:
    """Return the manifests that hold anything of a part; each of 0.1 holds everything."""
    return [manifest for manifest in manifests if manifest["format_version"] == 1 or part.id in manifest["arrays"]]


def of_first_group(plan: Plan, manifests: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the manifests from which loss and number of examples are taken: those of one group, since all have them."""
    return [manifest for manifest in manifests if plan.units_by_id[manifest["segment"]].group == 0]


def check_agreement(plan: Plan, manifests: Iterable[Mapping[str, Any]]) -> None:
    """Look whether the groups of every segment were added up over the same data.

    Args:
        plan: Of the window.
        manifests: Of its units.

    Raises:
        RunFailed: They were not; names the segment, the nodes and what to delete.
    """
    first: dict[int, Mapping[str, Any]] = {}
    for manifest in manifests:
        known = first.setdefault(manifest["start"], manifest)
        if known is manifest:
            continue
        if known["data_sha256"] == manifest["data_sha256"]:
            if abs(known["loss"] - manifest["loss"]) <= SAME_LOSS * abs(known["loss"]):
                continue
            differs = f"their losses are {known['loss']!r} and {manifest['loss']!r}"
        else:
            differs = "they were computed from other data"
        nodes = [found["environment"]["node"] for found in (known, manifest)]
        keys = [partial_key(found["segment"]) for found in (known, manifest)]
        raise RunFailed(
            f"segment {known['segment']} (examples {known['start']} to {known['stop'] - 1}): its module groups do not agree: "
            f"{differs}, on nodes {nodes[0]} and {nodes[1]}. Every node needs the same data and model. Find out which is "
            f"right, delete the other one of {keys[0]} and {keys[1]}, and run the same command again."
        )


def of_part(manifest: dict[str, Any], part: Part) -> dict[str, Any]:
    """Return a manifest without the entries that a part does not need: there may be many."""
    if manifest["format_version"] == 1:
        return manifest
    return {**manifest, "arrays": {part.id: manifest["arrays"][part.id]}}


def entries_of(manifest: Mapping[str, Any], part: Part) -> Any:
    """Return what says of which bytes a part of a partial is made: digests of its arrays."""
    if manifest["format_version"] > 1:
        return manifest["arrays"][part.id]["sha256"]
    return {name: entry["sha256"] for name, entry in sorted(manifest["arrays"].items())}


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
