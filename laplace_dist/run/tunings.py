"""Committed tunings of the prior precision, and the shards of scores that they were made of."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laplace_dist.errors import CheckpointError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.ownership import commit
from laplace_dist.storage.store import Store

_REMEDY = "Delete it and run the same command again."


def read_shard(store: Store, key: str, size: int | None = None) -> tuple[torch.Tensor, int]:
    """Return the summed scores of one shard for every value of the grid, and its number of examples.

    Args:
        store: The checkpoint.
        key: `shard_key(...)`.
        size: Number of values of the grid, if it is to be checked.

    Raises:
        CheckpointError: It is missing, truncated or altered.
    """
    text = open_json(store.read(key), key)["scores"]
    try:
        scores = json.loads(text)
        totals, n = torch.tensor(scores["totals"], dtype=torch.float64), scores["n"]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{key} is altered: it holds no scores. {_REMEDY}") from error
    if totals.ndim != 1 or len(totals) != (size or len(totals)) or type(n) is not int or n < 1:
        raise CheckpointError(f"{key} is altered: its scores are not those of this grid. {_REMEDY}")
    return totals, n


def commit_shard(store: Store, plan: Plan, key: str, totals: Tensor, n: int, environment: Mapping[str, Any]) -> None:
    """Commit the summed scores of one shard, unless they are there.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        key: `layout.tuning_shard_key(...)`.
        totals: For every value of the grid.
        n: Number of examples.
        environment: Where they were made.
    """
    # Scores may be infinite, where the sealed JSON of manifests allows numbers only.
    text = json.dumps({"totals": totals.tolist(), "n": n})
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "plan": plan.digest,
        "scores": text,
        "environment": dict(environment),
    }
    commit(store, plan, key, manifest)


def commit_tuning(
    store: Store,
    plan: Plan,
    key: str,
    chosen: Mapping[str, Any],
    la: Any,
    shards: Collection[str] = (),
    *,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Create the manifest of a tuning with the prior precision that the object has now, unless it exists."""
    prefix = f"{key.removesuffix('.json')}/{new_attempt()}"
    values = np.ascontiguousarray(la.prior_precision.detach().cpu().numpy())
    noise = float(la.sigma_noise) if la.likelihood_object.has_noise else None
    with torch.no_grad():
        evidence = float(la.log_marginal_likelihood())
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "plan": plan.digest,
        "settings": dict(chosen),
        "shards": list(shards),
        "prefix": prefix,
        "arrays": store.write_arrays(prefix, {"prior_precision": values}),
        "sigma_noise": noise,
        "log_marginal_likelihood": evidence,
        "environment": dict(environment),
    }
    if not commit(store, plan, key, manifest):
        store.delete_tree(prefix)
    return {"log_marginal_likelihood": evidence}


def read_tuning(store: Store, key: str) -> tuple[dict[str, Any], Tensor]:
    """Return a tuning's manifest and its prior precision.

    Raises:
        CheckpointError: It is missing, truncated or altered.
    """
    manifest = open_json(store.read(key), key)
    value = store.read_array(manifest["prefix"], "prior_precision", manifest["arrays"]["prior_precision"])
    return manifest, torch.from_numpy(value)


def apply_tuning(store: Store, la: Any, key: str) -> None:
    """Give a fitted object the prior precision, and for regression the observation noise, of a tuning."""
    manifest, prior_precision = read_tuning(store, key)
    la.prior_precision = prior_precision
    if manifest["sigma_noise"] is not None:
        la.sigma_noise = manifest["sigma_noise"]
