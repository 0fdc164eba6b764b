"""Choose the prior precision of a posterior version: by the evidence in one task, or over shards of validation data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from laplace.tuning import maximize_evidence, prior_precision_grid, score_grid, select_prior_precision
from laplace_dist.config.settings import Config
from laplace_dist.plan.plan import FORMAT_VERSION
from laplace_dist.plan.segments import Segment
from laplace_dist.run.layout import tuning_shard_key
from laplace_dist.run.tunings import commit_tuning, read_shard
from laplace_dist.storage.sealed_json import seal_json

STEPS, RATE = 100, 0.1  # of Adam on the logarithm of what is tuned


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
    return commit_tuning(context.store, key, chosen, la)


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
    own = tuning_shard_key(key, part.id)
    context.store.create(own, seal_json({"format_version": FORMAT_VERSION, "key": own, "scores": text}))
    return {"examples": part.stop - part.start}


def merge_grid(
    context: Any, version: str, key: str, chosen: dict[str, Any], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Add the shards' scores in order, choose the prior precision, and commit it."""
    grid = prior_precision_grid(size=context.config.grid_size)
    total, count = torch.zeros_like(grid), 0
    for shard in shards:
        part, n = read_shard(context.store, tuning_shard_key(key, shard["id"]), len(grid))
        total, count = total + part, count + n
    la = context.posterior(version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        la.prior_precision = select_prior_precision(grid, total / count)
    found = commit_tuning(context.store, key, chosen, la, [shard["id"] for shard in shards])
    return {**found, "warnings": [str(warning.message) for warning in caught]}
