"""Choose the prior precision of a posterior version: by the evidence in one task, or over shards of validation data."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from laplace.tuning import maximize_evidence, prior_precision_grid, score_grid, select_prior_precision
from laplace_dist.config import Config
from laplace_dist.errors import CheckpointError
from laplace_dist.partials import new_attempt
from laplace_dist.plan import FORMAT_VERSION, Segment, open_json, seal_json
from laplace_dist.store import Store

STEPS, RATE = 100, 0.1  # of Adam on the logarithm of what is tuned
_REMEDY = "Delete it and run the same command again."


def digest(values: Mapping[str, Any]) -> str:
    """Return a short name for settings: results under it were made with exactly these."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def settings(config: Config, validation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the result of tuning depends on beside the posterior version.

    Args:
        config: The job's settings.
        validation: Fingerprint of the validation split, for the grid search.
    """
    if config.tuning == "marglik":
        return {"method": "marglik", "structure": config.prior_structure, "steps": STEPS, "rate": RATE}
    names = ("grid_size", "link_approx", "pred_type", "batch_size", "seed")
    return {"method": "gridsearch", **{name: getattr(config, name) for name in names}, "data": validation}


def tuning_key(version: str, chosen: Mapping[str, Any]) -> str:
    """Return the key of the manifest of a tuning."""
    return f"tuning/{version}-{digest(chosen)}.json"


def shard_key(key: str, shard: str) -> str:
    """Return the key of one shard's scores."""
    return f"{key.removesuffix('.json')}/{shard}.json"


def tune_marglik(context: Any, version: str, key: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """Maximise the log marginal likelihood, for regression together with the observation noise, and commit the result.

    Args:
        context: The worker's model and store.
        version: Posterior version.
        key: Where the manifest goes.
        chosen: `settings(...)`.
    """
    la = context.posterior(version)
    start = la.initial_prior_precision(1.0, chosen["structure"])
    noise = 1.0 if context.config.likelihood == "regression" else None
    prior_precision, noise = maximize_evidence(la, start, noise, n_steps=STEPS, lr=RATE)
    la.prior_precision = prior_precision
    if noise is not None:
        la.sigma_noise = noise
    return commit(context.store, key, chosen, la)


def score_shard(context: Any, version: str, key: str, shard: dict[str, Any]) -> dict[str, Any]:
    """Score every value of the grid on one shard of the validation split and commit the sums.

    Args:
        context: The worker's model, data and store.
        version: Posterior version.
        key: Key of the tuning's manifest.
        shard: `id`, `start` and `stop`.
    """
    part, config = Segment(**shard), context.config
    batches = ((x, y) for _, x, y in context.batches("val", part.start, part.stop))
    totals, n = score_grid(
        context.posterior(version),
        batches,
        prior_precision_grid(size=config.grid_size),
        link_approx=config.link_approx,
        pred_type=config.pred_type,
        seed=config.seed + part.start,
    )
    scores = {"totals": totals.tolist(), "n": n}
    text = json.dumps(scores)  # scores may be infinite where the sealed JSON of manifests allows numbers only
    own = shard_key(key, part.id)
    context.store.create(own, seal_json({"format_version": FORMAT_VERSION, "key": own, "scores": text}))
    return {"examples": part.stop - part.start}


def merge_grid(
    context: Any, version: str, key: str, chosen: dict[str, Any], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Add the shards' scores in order, choose the prior precision, and commit it."""
    grid = prior_precision_grid(size=context.config.grid_size)
    total, count = torch.zeros_like(grid), 0
    for shard in shards:
        part, n = read_shard(context.store, shard_key(key, shard["id"]), len(grid))
        total, count = total + part, count + n
    la = context.posterior(version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        la.prior_precision = select_prior_precision(grid, total / count)
    found = commit(context.store, key, chosen, la, [shard["id"] for shard in shards])
    return {**found, "warnings": [str(warning.message) for warning in caught]}


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


def commit(store: Store, key: str, chosen: Mapping[str, Any], la: Any, shards: Collection[str] = ()) -> dict[str, Any]:
    """Create the manifest of a tuning with the prior precision that the object has now, unless it exists."""
    prefix = f"{key.removesuffix('.json')}/{new_attempt()}"
    values = np.ascontiguousarray(la.prior_precision.detach().cpu().numpy())
    noise = float(la.sigma_noise) if la.likelihood == "regression" else None
    with torch.no_grad():
        evidence = float(la.log_marginal_likelihood())
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "settings": dict(chosen),
        "shards": list(shards),
        "prefix": prefix,
        "arrays": store.write_arrays(prefix, {"prior_precision": values}),
        "sigma_noise": noise,
        "log_marginal_likelihood": evidence,
    }
    if not store.create(key, seal_json(manifest)):
        store.delete_tree(prefix)
    return {"log_marginal_likelihood": evidence}
