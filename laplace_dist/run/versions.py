"""Posterior versions: weighted sums of windows, committed under one manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import fsum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laplace.structures.sums import weighted_sum_in_order
from laplace_dist.errors import CheckpointError, ForeignError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.combination import Term
from laplace_dist.run.layout import LOSS, version_key
from laplace_dist.run.ownership import commit, has
from laplace_dist.run.partial_manifests import refuse_emptied
from laplace_dist.run.provenance import environment
from laplace_dist.run.vector import complete, overlaps, write
from laplace_dist.run.windows import SUM
from laplace_dist.storage.store import Store


def version_of(terms: Sequence[Term]) -> str:
    """Return the name of the posterior version that windows make, a pure function of their plans, bytes and weights.

    Which run it is, and what the windows are called, does not matter.
    """
    content = [[term.digest, term.weight] for term in terms]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def factors_of(terms: Sequence[Term], names: Collection[str]) -> dict[str, np.ndarray]:
    """Return some factors of a weighted sum of windows by name, float64, after verifying every byte that they are made of.

    Args:
        terms: The windows with their weights; the factors are those of their plans.
        names: Of the factors.

    Raises:
        CheckpointError: A part is missing, truncated or altered.
    """
    plan = terms[0].window.plan
    wanted = [place for place in plan.places if place.name in names]
    found = {place.name: np.empty(place.shape) for place in wanted}
    for part in plan.parts:
        if next(overlaps(wanted, part.start, part.stop), None) is not None:
            sums = (torch.from_numpy(_part(term, part.id)) for term in terms)
            total = weighted_sum_in_order(sums, [term.weight for term in terms])
            write(wanted, found, part.start, total.numpy())
    complete(wanted, found)
    return found


def _part(term: Term, part: str) -> np.ndarray:
    place = term.manifest["parts"][part]
    return term.window.store.read_array(place["prefix"], SUM, place["entry"])


def commit_version(store: Store, plan: Plan, terms: Sequence[Term], receipts: Iterable[Mapping[str, Any]]) -> None:
    """Create the manifest that makes the factors a posterior version, unless it exists.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        terms: The windows with their weights.
        receipts: `prefix` and `entry` of every factor by name, in several mappings.
    """
    factors = {name: place for receipt in receipts for name, place in receipt.items()}
    assert set(factors) == set(plan.posterior_spec["factors"]), "a posterior version needs every factor of the plan"
    version = version_of(terms)
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": plan.digest,
        "version": version,
        "n_data": weighted(terms, "n_data"),
        "loss": weighted(terms, "loss"),
        "environment": environment("cpu"),
        "windows": [{"window": term.window.name, "weight": term.weight, "sum": term.digest} for term in terms],
        "factors": factors,
    }
    if plan.further is not None:
        manifest["basis"] = basis_of(terms)
    if not commit(store, plan, version_key(version), manifest):
        for place in factors.values():  # another driver was first, with the same numbers
            store.delete_tree(place["prefix"])
    read_version(store, plan, version)


def basis_of(terms: Sequence[Term]) -> str:
    """Return the digest of the basis that the sums of some windows are in.

    Raises:
        CheckpointError: They are in several, so they do not add.
    """
    found = {term.window.plan.basis["sha256"] for term in terms}
    if len(found) > 1:
        raise CheckpointError(
            f"the windows {', '.join(term.window.name for term in terms)} are summed in different bases, so they do not add. "
            "Restore the run from a copy, or start again with --fresh."
        )
    return found.pop()


def weighted(terms: Sequence[Term], field: str) -> float:
    """Return the weighted sum of a number of the windows; of whole numbers with weights of 1 a whole number."""
    values = [term.manifest[field] if term.weight == 1 else term.weight * term.manifest[field] for term in terms]
    return sum(values) if all(isinstance(value, int) for value in values) else fsum(values)


def read_version(store: Store, plan: Plan, version: str) -> dict[str, Any]:
    """Return the manifest of a posterior version, checked against the plan.

    Raises:
        MissingObjectError: It is not committed.
        CheckpointError: It is truncated, altered or of another plan.
    """
    key = version_key(version)
    manifest = open_json(store.read(key), key)
    shapes = {name: place["entry"]["shape"] for name, place in manifest["factors"].items()}
    planned = {name: list(factor["shape"]) for name, factor in plan.posterior_spec["factors"].items()}
    if manifest["format_version"] == 1:
        planned[LOSS] = []
    whole = manifest.get("windows") is not None or manifest["n_data"] == plan.n_examples
    whole = whole and (plan.further is None) == (manifest.get("basis") is None)
    if not whole or (manifest["plan"], manifest["version"], shapes) != (plan.digest, version, planned):
        raise (CheckpointError if manifest["plan"] == plan.digest else ForeignError)(
            f"{key} does not belong to this run's plan. Delete it and run the same command again: it reduces the "
            "partials anew."
        )
    arrays = {name: place["entry"] for name, place in manifest["factors"].items()}
    refuse_emptied(arrays, manifest["format_version"], key, "Start again with --fresh.")
    return manifest


def discard_torn(store: Store, plan: Plan, version: str) -> bool:
    """Delete the manifest of a version whose arrays are not there, so that they can be made again; says whether it did.

    A job that stood still while another one took over and collected what nothing named may have committed such a manifest.
    """
    key = version_key(version)
    if not has(store, plan, key):
        return False
    manifest, there = read_version(store, plan, version), set(store.list(key.removesuffix(".json")))
    if all(f"{place['prefix']}/{name}/zarr.json" in there for name, place in manifest["factors"].items()):
        return False
    store.delete_tree(key)
    return True


def read_factor(store: Store, manifest: Mapping[str, Any], name: str) -> Tensor:
    """Return one factor of a posterior version.

    Raises:
        CheckpointError: It is missing, truncated or altered.
    """
    place = manifest["factors"][name]
    return torch.from_numpy(store.read_array(place["prefix"], name, place["entry"]))


def read_loss(store: Store, manifest: Mapping[str, Any]) -> float:
    """Return the summed loss of a posterior version."""
    if manifest["format_version"] > 1:
        return manifest["loss"]
    place = manifest["factors"][LOSS]
    return float(store.read_array(place["prefix"], LOSS, place["entry"]))


def windows_in(store: Store, plan: Plan, version: str) -> list[str]:
    """Return the names of the windows that a posterior version is a sum of; of an older format there is one.

    Raises:
        CheckpointError: Its manifest is missing, truncated or altered.
    """
    return [
        term["window"] for term in read_version(store, plan, version).get("windows") or [{"window": plan.window_name}]
    ]
