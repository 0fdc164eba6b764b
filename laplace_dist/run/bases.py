"""The committed basis of a second pass: found once in a run, from the sum of its first window."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.structures.registry import SECOND_PASSES
from laplace.structures.second_pass import BasisPart, SecondPass
from laplace.structures.specification import SumsSpec
from laplace_dist.errors import CheckpointError, ForeignError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import basis_key, remedy
from laplace_dist.run.ownership import commit
from laplace_dist.run.provenance import environment
from laplace_dist.storage.store import Store


def law_of(plan: Plan) -> SecondPass:
    """Return what the structure of a run does between its passes."""
    return SECOND_PASSES[plan.settings["hessian_structure"]]


def parts_of(plan: Plan) -> dict[str, BasisPart]:
    """Return the arrays of the basis of a run by name."""
    return law_of(plan).basis(SumsSpec.from_json(plan.spec))


def commit_basis(store: Store, plan: Plan, of: str, receipts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Create the manifest that makes arrays the basis of the run, unless there is one, and return what is stored.

    Args:
        store: The checkpoint.
        plan: Of the run.
        of: Digest of the sum that it was found from.
        receipts: `prefix` and `entry` of every array by name, in several mappings.
    """
    factors = {name: place for receipt in receipts for name, place in receipt.items()}
    assert set(factors) == set(parts_of(plan)), "a basis needs every array"
    key = basis_key(plan.further["name"])
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "plan": plan.digest,
        "of": of,
        "factors": factors,
        "environment": environment("cpu"),
    }
    if not commit(store, plan, key, manifest):
        for place in factors.values():  # another driver was first
            store.delete_tree(place["prefix"])
    return read_manifest(store, plan)


def read_manifest(store: Store, plan: Plan) -> dict[str, Any]:
    """Return the manifest of the run's basis, checked against the plan.

    Raises:
        MissingObjectError: It is not committed.
        CheckpointError: It is truncated, altered or of another plan.
    """
    key = basis_key(plan.further["name"])
    manifest = open_json(store.read(key), key)
    found = {name: tuple(place["entry"]["shape"]) for name, place in manifest["factors"].items()}
    wanted = {name: part.shape for name, part in parts_of(plan).items()}
    if manifest["plan"] != plan.digest or found != wanted:
        kind = CheckpointError if manifest["plan"] == plan.digest else ForeignError
        raise kind(f"{key} does not belong to this run's plan. {remedy(key)}")
    return manifest


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a basis: of its arrays' bytes by name."""
    entries = {name: place["entry"]["sha256"] for name, place in sorted(manifest["factors"].items())}
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def read_basis(
    store: Store, plan: Plan, wanted: str, device: torch.device | str, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the arrays of the run's basis by name, after verifying every byte.

    Args:
        store: The checkpoint.
        plan: Of the run.
        wanted: Digest of the basis that is meant.
        device: Where they go.
        names: Of the arrays; all of them if not given.

    Raises:
        MissingObjectError: It is not committed.
        CheckpointError: It is truncated, altered, or another one.
    """
    manifest = read_manifest(store, plan)
    if digest_of(manifest) != wanted:
        raise CheckpointError(
            f"{basis_key(plan.further['name'])} is another basis ({digest_of(manifest)[:12]}) than the sums are in "
            f"({wanted[:12]}). Restore it from a copy, or start again with --fresh."
        )
    places = [(name, place) for name, place in manifest["factors"].items() if names is None or name in names]
    arrays = ((name, store.read_array(place["prefix"], name, place["entry"])) for name, place in places)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays}
