"""The spectra of a posterior version's factors, a few values of each: computed once, then kept beside the report.

One factor is in memory at a time. Those of which decompositions are committed need none; of the others, none is decomposed
that would take longer than a moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from laplace.linalg.eigen import eigenvalues
from laplace.linalg.kronecker import rounded_factor
from laplace.structures.specification import SumsSpec
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run import decompositions
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import LOSS, spectra_key
from laplace_dist.run.ownership import confirm, of_another
from laplace_dist.run.versions import read_factor, read_version
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

VALUES = 64  # of each spectrum that are kept: its largest, its smallest, and between them evenly by rank
LARGEST = 4096  # rows of a factor above which it is not decomposed; a minute on one core
BUDGET = 2 * LARGEST**3  # of all of them, in multiply-adds: two of the largest
ENTRIES = 2**28  # of a diagonal factor above which it is not read


def spectra(store: Store, plan: Plan, version: str) -> list[dict[str, Any]]:
    """Return the spectra of the factors of a posterior version, from where they are kept if they are.

    Args:
        store: The checkpoint.
        plan: Of the run.
        version: Posterior version.

    Returns:
        For each factor its name under `factor`, its rows under `size`, under `values` at most `VALUES` eigenvalues as the
        posterior has them (of inputs those of the mean, else of the sum), the largest first, and under `skipped` why none.

    Raises:
        CheckpointError: A factor is missing, truncated or altered.
    """
    if (kept := _kept(store, plan, version)) is not None:
        return kept
    manifest, left, found = read_version(store, plan, version), BUDGET, []
    known = decompositions.values_of(store, plan, version)
    for name, place in sorted(manifest["factors"].items(), key=lambda item: prod(item[1]["entry"]["shape"])):
        if name == LOSS:
            continue
        shape, symmetric = place["entry"]["shape"], plan.posterior_spec["factors"][name]["symmetric"]
        entry = {"factor": name, "size": shape[0] if symmetric else prod(shape), "values": [], "skipped": None}
        found.append(entry)
        cost = shape[0] ** 3 if symmetric and name not in known else 0
        if cost > min(left, LARGEST**3) or (not symmetric and prod(shape) > ENTRIES):
            entry["skipped"] = "too large to be decomposed for a report"
            continue
        left -= cost
        entry["values"] = _some(known[name] if name in known else _values(store, plan, manifest, name))
    order = list(plan.posterior_spec["factors"])
    found.sort(key=lambda entry: order.index(entry["factor"]))
    key = spectra_key(version)
    confirm(store, plan)
    content = {"format_version": FORMAT_VERSION, "plan": plan.digest, "key": key, "spectra": found}
    store.replace(key, seal_json(content))
    return found


def _kept(store: Store, plan: Plan, version: str) -> list[dict[str, Any]] | None:
    """Return the spectra that are kept; what is damaged or of another run is made anew."""
    key = spectra_key(version)
    try:
        found: Mapping[str, Any] = open_json(store.read(key), key)
    except (MissingObjectError, CheckpointError, SettingsError):
        return None
    return None if of_another(found, plan) else found["spectra"]


def _values(store: Store, plan: Plan, manifest: Mapping[str, Any], name: str) -> Tensor:
    """Return the eigenvalues of one factor; of a diagonal its entries."""
    value = read_factor(store, manifest, name)
    if not plan.posterior_spec["factors"][name]["symmetric"]:
        return value.double().flatten()
    if plan.posterior_spec.get("structure") == "kron":
        value = rounded_factor(name, value, manifest["n_data"], SumsSpec.from_json(plan.posterior_spec).torch_dtype)
    return eigenvalues(value, f"factor {name!r}")


def _some(values: Tensor) -> list[float]:
    """Return some of the values, the largest first."""
    values = values.sort(descending=True)[0]
    picked = torch.linspace(0, len(values) - 1, min(VALUES, len(values)), dtype=torch.float64).round().long()
    return values[picked].tolist()
