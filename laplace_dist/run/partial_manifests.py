"""The manifests of partials: read and checked against the plan, chosen by part and group, compared with one another.

Where a run has several module groups there is one partial for each group of a segment, which holds the group's entries of the
parts and has the segment's loss and number of examples, like those of the other groups. A `unit` is what a partial is of: a
segment and a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from laplace_dist.errors import CheckpointError, ForeignError, RunFailed, listed
from laplace_dist.plan.groups import Group
from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import LOSS, attempt_prefix, partial_key
from laplace_dist.storage.keys import check_key
from laplace_dist.storage.store import Store

# By which the losses of a segment's groups may differ, relative: their passes may be on unlike hardware.
SAME_LOSS = 1e-3


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
    wanted = planned_facts(plan, unit, manifest.get("attempt"))
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


def planned_facts(plan: Plan, unit: Segment, attempt: Any) -> dict[str, Any]:
    """Return what the plan alone says that the manifest of an attempt at a unit has to hold."""
    return {
        "plan": plan.digest,
        "segment": unit.id,
        "start": unit.start,
        "stop": unit.stop,
        "n_data": unit.stop - unit.start,
        "prefix": attempt_prefix(partial_key(unit.id), attempt),
    }


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
