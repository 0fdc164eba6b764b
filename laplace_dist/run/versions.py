"""Posterior versions: the sums of the partials, committed under one manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from laplace_dist.errors import CheckpointError, ForeignError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import LOSS, version_key
from laplace_dist.run.ownership import commit
from laplace_dist.run.partials import refuse_emptied
from laplace_dist.run.provenance import environment
from laplace_dist.run.vector import complete, overlaps, write
from laplace_dist.run.windows import SUM
from laplace_dist.storage.store import Store


def version_of(plan: Plan, window: Mapping[str, Any]) -> str:
    """Return the name of the posterior version that a window's sum makes, a pure function of the plan and the bytes.

    Args:
        plan: Plan of the run; which run it is does not matter.
        window: The manifest of the window's sum.
    """
    parts = {name: place["entry"]["sha256"] for name, place in sorted(window["parts"].items())}
    content = [plan.content, window["n_data"], window["loss"], parts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def factors_of(store: Store, plan: Plan, window: Mapping[str, Any], names: Collection[str]) -> dict[str, np.ndarray]:
    """Return some factors of a window's sum by name, float64, after verifying every byte that they are made of.

    Raises:
        CheckpointError: A part is missing, truncated or altered.
    """
    wanted = [place for place in plan.places if place.name in names]
    found = {place.name: np.empty(place.shape) for place in wanted}
    for part in plan.parts:
        if next(overlaps(wanted, part.start, part.stop), None) is not None:
            place = window["parts"][part.id]
            write(wanted, found, part.start, store.read_array(place["prefix"], SUM, place["entry"]))
    complete(wanted, found)
    return found


def commit_version(store: Store, plan: Plan, window: Mapping[str, Any], receipts: Iterable[Mapping[str, Any]]) -> None:
    """Create the manifest that makes the factors a posterior version, unless it exists.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        window: The manifest of the window's sum.
        receipts: `prefix` and `entry` of every factor by name, in several mappings.
    """
    factors = {name: place for receipt in receipts for name, place in receipt.items()}
    assert set(factors) == set(plan.spec["factors"]), "a posterior version needs every factor of the plan"
    version = version_of(plan, window)
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": plan.digest,
        "version": version,
        "n_data": plan.n_examples,
        "loss": window["loss"],
        "environment": environment("cpu"),
        "factors": factors,
    }
    if not commit(store, plan, version_key(version), manifest):
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
    planned = {name: list(factor["shape"]) for name, factor in plan.spec["factors"].items()}
    if manifest["format_version"] == 1:
        planned[LOSS] = []
    found = manifest["plan"], manifest["version"], manifest["n_data"], shapes
    if found != (plan.digest, version, plan.n_examples, planned):
        raise (CheckpointError if manifest["plan"] == plan.digest else ForeignError)(
            f"{key} does not belong to this run's plan. Delete it and run the same command again: it reduces the "
            "partials anew."
        )
    arrays = {name: place["entry"] for name, place in manifest["factors"].items()}
    refuse_emptied(arrays, manifest["format_version"], key, "Start again with --fresh.")
    return manifest


def read_loss(store: Store, manifest: Mapping[str, Any]) -> float:
    """Return the summed loss of a posterior version."""
    if manifest["format_version"] > 1:
        return manifest["loss"]
    place = manifest["factors"][LOSS]
    return float(store.read_array(place["prefix"], LOSS, place["entry"]))
