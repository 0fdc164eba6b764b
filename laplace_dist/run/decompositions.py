"""Committed eigendecompositions of a posterior version's factors, which whoever predicts would make anew otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.structures.decomposition import widths
from laplace.structures.specification import SumsSpec
from laplace_dist.errors import CheckpointError, MissingObjectError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import attempt_prefix, decomposition_key, remedy
from laplace_dist.run.ownership import commit, has, is_foreign
from laplace_dist.storage.store import Store

WORTH = 1024**3  # sum of cubed widths, half a second's work: below that, commits cost more than they save
VALUES, VECTORS = "values", "vectors"


def names_of(plan: Plan) -> dict[str, str]:
    """Return the factors whose decompositions are worth keeping, by the key's part that stands for them."""
    found = widths(SumsSpec.from_json(plan.posterior_spec))
    if sum(width**3 for width in found.values()) < WORTH:
        return {}
    order = {name: f"{number:05d}" for number, name in enumerate(plan.posterior_spec["factors"])}
    return {order[name]: name for name in found}


def missing(store: Store, plan: Plan, version: str) -> list[str]:
    """Return the names of the factors of a version whose decompositions are worth keeping and not committed."""
    places = names_of(plan).items()
    return [name for place, name in places if not has(store, plan, decomposition_key(version, place))]


def commit_decomposition(
    store: Store, plan: Plan, version: str, name: str, pair: tuple[Tensor, Tensor], environment: Mapping[str, Any]
) -> None:
    """Commit the eigenvalues and eigenvectors of one factor of a version, unless they are there."""
    place = next(place for place, other in names_of(plan).items() if other == name)
    key = decomposition_key(version, place)
    prefix = attempt_prefix(key, new_attempt())
    arrays = {kind: value.cpu().contiguous().numpy() for kind, value in zip((VALUES, VECTORS), pair, strict=True)}
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "plan": plan.digest,
        "factor": name,
        "prefix": prefix,
        "arrays": store.write_arrays(prefix, arrays),
        "environment": dict(environment),
    }
    if not commit(store, plan, key, manifest):
        store.delete_tree(prefix)


def read(store: Store, plan: Plan, version: str, device: torch.device | str) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Return the decompositions of a version by factor, or None where not all of them are committed.

    Raises:
        CheckpointError: One is truncated or altered.
    """
    manifests = {}
    for place, name in names_of(plan).items():
        key = decomposition_key(version, place)
        try:
            data = store.read(key)
        except MissingObjectError:
            return None
        if is_foreign(data, key, plan):
            return None
        manifests[name] = open_json(data, key)
        _check(plan, key, name, manifests[name])
    found = {}
    for name, manifest in manifests.items():
        pair = (store.read_array(manifest["prefix"], kind, manifest["arrays"][kind]) for kind in (VALUES, VECTORS))
        values, vectors = (torch.from_numpy(array).to(device) for array in pair)
        found[name] = values, vectors
    return found or None


def values_of(store: Store, plan: Plan, version: str) -> dict[str, Tensor]:
    """Return the eigenvalues alone, ascending, of the factors of a version whose decompositions are committed, by name.

    Raises:
        CheckpointError: One is truncated or altered.
    """
    found = {}
    for place, name in names_of(plan).items():
        key = decomposition_key(version, place)
        if has(store, plan, key):
            manifest = open_json(store.read(key), key)
            _check(plan, key, name, manifest)
            found[name] = torch.from_numpy(store.read_array(manifest["prefix"], VALUES, manifest["arrays"][VALUES]))
    return found


def _check(plan: Plan, key: str, name: str, manifest: Mapping[str, Any]) -> None:
    shape = plan.posterior_spec["factors"][name]["shape"]
    found = {kind: entry["shape"] for kind, entry in manifest["arrays"].items()}
    if manifest["factor"] != name or found != {VALUES: shape[:1], VECTORS: shape}:
        raise CheckpointError(f"{key} is not the decomposition of factor {name!r} of this run. {remedy(key)}")
