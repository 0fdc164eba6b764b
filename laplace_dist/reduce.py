"""Sum the partials of every factor in plan order, and commit the sums as one posterior version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch

from laplace.curvature.sums import sum_in_order
from laplace_dist.errors import CheckpointError
from laplace_dist.partials import LOSS, manifest_key, new_attempt, parse_manifest, place_of
from laplace_dist.plan import FORMAT_VERSION, Plan, open_json, seal_json
from laplace_dist.store import Store

GROUP_BYTES = 32 * 2**20


def manifests(store: Store, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield the manifest of every segment in plan order, one at a time, each checked against the plan.

    Raises:
        MissingObjectError: A segment is not committed.
        CheckpointError: A manifest is truncated, altered or of another plan.
    """
    found = store.read_many([manifest_key(segment.id) for segment in plan.segments])
    for segment, (_, data) in zip(plan.segments, found, strict=True):
        yield parse_manifest(data, plan, segment)


def version_of(store: Store, plan: Plan) -> str:
    """Return the posterior version that the committed partials make, a pure function of the plan and their bytes."""
    return version_name(plan, manifests(store, plan))


def version_name(plan: Plan, manifests: Iterable[Mapping[str, Any]]) -> str:
    """Return the name of the posterior version that partials make.

    Args:
        plan: Plan of the run.
        manifests: Of every segment, in plan order.
    """
    digest = hashlib.sha256(plan.digest.encode())
    for manifest in manifests:
        arrays = {name: entry["sha256"] for name, entry in sorted(manifest["arrays"].items())}
        digest.update(json.dumps([manifest["segment"], manifest["n_data"], arrays]).encode())
    return digest.hexdigest()[:16]


def groups(spec: Mapping[str, Any]) -> list[list[str]]:
    """Return the names of the factors, in lists that one task each sums.

    A large factor is alone, so that a task's memory is two copies of it; small ones share a task, since each task
    reads every manifest.

    Args:
        spec: The plan's specification of the sums.
    """
    size = torch.finfo(getattr(torch, spec["dtype"])).bits // 8
    result, held = [[LOSS]], 0
    for name, factor in spec["factors"].items():
        bytes_ = prod(factor["shape"]) * size
        if held + bytes_ > GROUP_BYTES:
            result.append([])
            held = 0
        result[-1].append(name)
        held += bytes_
    return result


def reduce_group(context: Any, version: str, names: list[str]) -> dict[str, Any]:
    """Sum some factors over the partials in plan order and write them for a posterior version.

    The sum is in float64 and rounded once. Nothing refers to what was written before `commit_version` does.

    Args:
        context: The worker's store and plan.
        version: Name of the posterior version.
        names: Factors to sum.

    Returns:
        For each name, `prefix` and `entry` of the array.
    """
    store, plan = context.store, context.plan
    slim = [{**m, "arrays": {name: m["arrays"][name] for name in names}} for m in manifests(store, plan)]
    found = {}
    for name in names:
        prefix = f"posteriors/{version}/{new_attempt()}"
        reads = store.read_arrays(place_of(manifest, name) for manifest in slim)
        total = sum_in_order(torch.from_numpy(read()) for read in reads)
        symmetric = {name} if name != LOSS and plan.spec["factors"][name]["symmetric"] else set()
        entry = store.write_arrays(prefix, {name: total.numpy()}, symmetric)[name]
        found[name] = {"prefix": prefix, "entry": entry}
    return found


def version_key(version: str) -> str:
    """Return the key of a posterior version's manifest."""
    return f"posteriors/{version}.json"


def commit_version(store: Store, plan: Plan, version: str, receipts: Iterable[Mapping[str, Any]]) -> None:
    """Create the manifest that makes the factors a posterior version, unless it exists.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        version: Name of the posterior version.
        receipts: What the tasks of `reduce_group` returned.
    """
    factors = {name: place for receipt in receipts for name, place in receipt.items()}
    assert set(factors) == {LOSS, *plan.spec["factors"]}, "a posterior version needs every factor of the plan"
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": plan.digest,
        "version": version,
        "n_data": plan.n_examples,
        "factors": factors,
    }
    if not store.create(version_key(version), seal_json(manifest)):
        for place in factors.values():  # another driver was first, with the same numbers
            store.delete_tree(place["prefix"])
    read_version(store, plan, version)


def read_version(store: Store, plan: Plan, version: str) -> dict[str, Any]:
    """Return the manifest of a posterior version, checked against the plan.

    Raises:
        MissingObjectError: It is not committed.
        CheckpointError: It is truncated, altered or of another plan.
    """
    key = version_key(version)
    manifest = open_json(store.read(key), key)
    shapes = {name: place["entry"]["shape"] for name, place in manifest["factors"].items()}
    planned = {LOSS: [], **{name: list(factor["shape"]) for name, factor in plan.spec["factors"].items()}}
    found = manifest["plan"], manifest["version"], manifest["n_data"], shapes
    if found != (plan.digest, version, plan.n_examples, planned):
        raise CheckpointError(
            f"{key} does not belong to this run's plan. Delete it and run the same command again: it reduces the "
            "partials anew."
        )
    return manifest
