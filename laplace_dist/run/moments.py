"""The second pass over a run's data: sums in the eigenbasis of a posterior version, laid out like a window of its own.

The basis is that of the version's committed eigendecompositions, and its digest is in the pass's own plan: workers and whoever
continues or loads the pass compare it with the eigenvectors that are there. What is summed in one basis is nothing in another.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from laplace.structures.ekfac import Eigenbasis, second_pass
from laplace.structures.sums import CurvatureSums, SumsSpec
from laplace_dist.errors import CheckpointError, MissingObjectError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import decompositions, windows
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.combination import Window
from laplace_dist.run.layout import LOSS, MOMENTS, PLAN
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.vector import complete, write
from laplace_dist.storage.sealed_json import seal_json


def place_of(store: Checkpoint, version: str) -> Checkpoint:
    """Return the store of a version's second pass."""
    return store.under(f"{MOMENTS}/{version}")


def plan_of(store: Checkpoint, plan: Plan, version: str) -> Plan:
    """Return the plan of a version's second pass: the run's own, with second moments in the version's eigenbasis as sums.

    Raises:
        MissingObjectError: An eigendecomposition is not committed.
    """
    spec = second_pass(SumsSpec.from_json(plan.spec), decompositions.basis_digest(store, plan, version))
    return replace(plan, spec=json.loads(json.dumps(spec.to_json())))


def open_pass(store: Checkpoint, plan: Plan, version: str) -> tuple[Window, bool]:
    """Begin a second pass, or continue the one that is there; returns it and whether it was there.

    Raises:
        CheckpointError: It was begun in another eigenbasis, or its plan is truncated or altered.
    """
    place, wanted = place_of(store, version), plan_of(store, plan, version)
    if place.create(PLAN, seal_json(wanted.to_values())):
        return Window(place, wanted), False
    stored = read_plan(place)
    if stored.run != wanted.run:  # a deleted run has left it
        place.replace(PLAN, seal_json(wanted.to_values()))
        return Window(place, wanted), False
    _same_basis(place, stored, wanted)
    return Window(place, stored), True


def read_pass(store: Checkpoint, plan: Plan, version: str) -> Window:
    """Return a second pass that was begun, compared with the eigenvectors that are there.

    Raises:
        MissingObjectError: It was not begun, or an eigendecomposition is not committed.
        CheckpointError: It was begun in another eigenbasis, or its plan is truncated or altered.
    """
    place = place_of(store, version)
    try:
        stored = read_plan(place)
    except MissingObjectError as error:
        raise MissingObjectError(
            f"{place.url}/{PLAN} is missing: the second pass of version {version} was not begun. Run the fit job again."
        ) from error
    _same_basis(place, stored, plan_of(store, plan, version))
    return Window(place, stored)


def _same_basis(place: Checkpoint, stored: Plan, wanted: Plan) -> None:
    if stored.spec.get("basis") != wanted.spec["basis"]:
        raise CheckpointError(
            f"{place.url} was summed in the eigenbasis {stored.spec.get('basis')}, and that of the committed decompositions "
            f"is {wanted.spec['basis']}: they were made again, elsewhere or of other numbers. Restore decompositions/ from a "
            f"copy, or delete {MOMENTS}/ and run the fit job again: it takes the second pass anew."
        )
    if stored.digest != wanted.digest:
        raise CheckpointError(
            f"{place.url}/{PLAN} is not the plan of a second pass of this run. Delete {MOMENTS}/ and run the fit job again."
        )


def read_basis(store: Checkpoint, plan: Plan, version: str, device: torch.device | str) -> Eigenbasis:
    """Return the eigenvectors of a version.

    Raises:
        MissingObjectError: One is not committed.
        CheckpointError: One is truncated or altered.
    """
    known = decompositions.read(store, plan, version, device)
    if known is None:
        raise MissingObjectError(
            f"{store.url}/decompositions/{version}/ lacks an eigendecomposition, which the second pass is taken in. Run the "
            "fit job again: it decomposes that factor anew."
        )
    return Eigenbasis({name: vectors for name, (_, vectors) in known.items()})


def read_sums(store: Checkpoint, plan: Plan, version: str, device: torch.device | str) -> CurvatureSums:
    """Return the second moments of a version.

    Raises:
        MissingObjectError: The second pass is not finished.
        CheckpointError: It was begun in another eigenbasis than the one that is there, or something is truncated or altered.
    """
    found = read_pass(store, plan, version)
    try:
        manifest = windows.read_window(found.store, found.plan)
    except MissingObjectError as error:
        raise MissingObjectError(
            f"{found.store.url} is not finished: version {version} has no second moments yet. Run its fit job to the end."
        ) from error
    arrays = {place.name: np.empty(place.shape) for place in found.plan.places}
    for part in found.plan.parts:
        place = manifest["parts"][part.id]
        write(
            found.plan.places, arrays, part.start, found.store.read_array(place["prefix"], windows.SUM, place["entry"])
        )
    complete(found.plan.places, arrays)
    tensors: dict[str, Tensor] = {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
    tensors[LOSS] = torch.tensor(manifest["loss"], dtype=torch.float64, device=device)
    return CurvatureSums.from_tensors(SumsSpec.from_json(found.plan.spec), tensors, manifest["n_data"])
