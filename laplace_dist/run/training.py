"""Committed states of a training: after every epoch one file with all that it takes to go on, and a manifest that names it.

A file is named by its content, so whoever does an epoch again writes the same one; the manifest is created only once. Of older
epochs the manifests stay, which hold the losses and evidences; their files go.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from laplace_dist.errors import CheckpointError, MissingObjectError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import TRAINED, TRAINING, epoch_key, remedy, training_file_key
from laplace_dist.run.ownership import commit, confirm, is_foreign
from laplace_dist.run.provenance import environment
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Epoch:
    """What is committed after an epoch.

    Attributes:
        number: Of the epoch, from 1.
        loss: Mean training loss.
        margliks: Negative evidences before every step on the hyperparameters; none where it was not estimated.
        state: Sha256 of the file to go on from.
        best: Sha256 of the file with the best posterior so far, or None.
        best_epoch: Epoch that it is of, or None.
        hyper: Prior precision and noise as `trained.hyper_of` returns them: of the last estimate, where there was one in the
            epoch. None of trainings of before they were kept.
    """

    number: int
    loss: float
    margliks: tuple[float, ...]
    state: str
    best: str | None
    best_epoch: int | None
    hyper: Mapping[str, Any] | None = None


def is_training(plan: Plan) -> bool:
    """Say whether a run is a training by empirical Bayes, and not a fit."""
    return "n_hypersteps" in plan.settings


def write_file(store: Store, plan: Plan, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
    """Write tensors and plain values as one file, unless it is there; returns its sha256."""
    flat = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    content = safetensors.torch.save(flat, metadata={"values": json.dumps(values, sort_keys=True)})
    digest = hashlib.sha256(content).hexdigest()
    confirm(store, plan)
    key = training_file_key(digest)
    if not store.create(key, content) and store.read(key) != content:
        store.replace(key, content)  # was truncated or altered
    return digest


def read_file(store: Store, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `write_file` has written.

    Raises:
        CheckpointError: It is missing, truncated or altered.
    """
    key = training_file_key(digest)
    content = store.read(key)
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{key} is truncated or altered: it has not the sha256 in its name. {remedy(key)}")
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return safetensors.torch.load(content), json.loads(header["__metadata__"]["values"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{key} holds no state of a training. {remedy(key)}") from error


def commit_epoch(store: Store, plan: Plan, epoch: Epoch) -> bool:
    """Commit an epoch, whose files are there; says whether what is stored is this one."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": epoch_key(epoch.number),
        "plan": plan.digest,
        **vars(epoch),
        "margliks": list(epoch.margliks),
        "environment": environment("cpu"),
    }
    return commit(store, plan, epoch_key(epoch.number), manifest)


def epochs(store: Store, plan: Plan) -> list[Epoch]:
    """Return the committed epochs of a run in order.

    Raises:
        CheckpointError: A manifest is truncated or altered, or one is missing between others.
    """
    pattern = re.compile(rf"{TRAINING}/epochs/\d+\.json")
    found = []
    for key, content in store.read_many(sorted(filter(pattern.fullmatch, store.list(f"{TRAINING}/epochs")))):
        if is_foreign(content, key, plan):
            continue
        values = open_json(content, key)
        own = {name: values.get(name) for name in Epoch.__dataclass_fields__}
        found.append(Epoch(**{**own, "margliks": tuple(values["margliks"])}))
    for number, epoch in enumerate(found, 1):
        if epoch.number != number:
            raise MissingObjectError(
                f"{epoch_key(number)} is missing, and later epochs are there. {remedy(epoch_key(number))}"
            )
    return found


def drop_files(store: Store, history: list[Epoch]) -> None:
    """Delete the files that only epochs before the last two name."""
    kept = {name for epoch in history[-2:] for name in (epoch.state, epoch.best)}
    for epoch in history[-4:-2]:
        for digest in {epoch.state, epoch.best} - kept - {None}:
            store.delete_tree(training_file_key(digest))


def write_trained(store: Store, plan: Plan, content: bytes) -> None:
    """Put the weights of the best posterior where `--weights` of other jobs can take them."""
    confirm(store, plan)
    store.replace(TRAINED, content)
