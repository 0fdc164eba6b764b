"""Posterior versions: the sums of the partials, committed under one manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from laplace_dist.errors import CheckpointError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import LOSS, partial_key, version_key
from laplace_dist.run.partials import parse_manifest
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store


def manifests(store: Store, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield the manifest of every segment in plan order, one at a time, each checked against the plan.

    Raises:
        MissingObjectError: A segment is not committed.
        CheckpointError: A manifest is truncated, altered or of another plan.
    """
    found = store.read_many([partial_key(segment.id) for segment in plan.segments])
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
