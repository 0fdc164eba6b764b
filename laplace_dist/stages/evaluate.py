"""MAP and Laplace side by side: per-example scores of shards, committed as arrays, then summarised in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laplace.utils.metrics import (
    classification_scores,
    regression_scores,
    summarize_classification,
    summarize_regression,
)
from laplace_dist.config.settings import Config
from laplace_dist.plan.plan import FORMAT_VERSION
from laplace_dist.plan.segments import Segment
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import evaluation_shard_key
from laplace_dist.storage.sealed_json import seal_json


def settings(config: Config, tuning: str | None, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the result of an evaluation depends on beside the posterior version.

    Args:
        config: The job's settings.
        tuning: Key of the tuning that is in force, or None.
        data: Fingerprints of the splits by name.
    """
    names = ("link_approx", "pred_type", "batch_size", "seed")
    return {**{name: getattr(config, name) for name in names}, "tuning": tuning, "data": dict(data)}


def evaluate_shard(
    context: Any, version: str, tuning: str | None, key: str, split: str, shard: dict[str, Any]
) -> dict[str, Any]:
    """Score MAP and Laplace on one shard of a split and commit the scores of its examples.

    Args:
        context: The worker's model, data and store.
        version: Posterior version.
        tuning: Key of a tuning, or None for the default prior.
        key: Key of the evaluation's metrics.
        split: `test` or an out-of-distribution split; of the latter only the confidence is kept.
        shard: `id`, `start` and `stop`.
    """
    part, la = Segment(**shard), context.posterior(version, tuning)
    found: dict[str, list[Tensor]] = {}
    for offset, x, y in context.batches(split, part.start, part.stop):
        for name, scores in _batch_scores(context, la, x, y, offset, split):
            found.setdefault(name, []).append(scores.cpu())
    arrays = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    name = evaluation_shard_key(key, split, part.id)
    prefix = f"{name.removesuffix('.json')}/{new_attempt()}"
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": name,
        "prefix": prefix,
        "arrays": context.store.write_arrays(prefix, arrays),
    }
    if not context.store.create(name, seal_json(manifest)):
        context.store.delete_tree(prefix)
    return {"examples": part.stop - part.start}


@torch.no_grad()
def _batch_scores(context: Any, la: Any, x: Any, y: Tensor, offset: int, split: str) -> Iterator[tuple[str, Tensor]]:
    """Yield `(method/score, values)` for one batch; what is sampled is seeded by the batch's place in the split."""
    config = context.config
    generator = torch.Generator(context.device).manual_seed(config.seed + offset)
    link = {"link_approx": config.link_approx}
    outputs = context.model(x)
    if config.likelihood == "regression":
        mean, variance = la(x, pred_type=config.pred_type, diagonal_output=True, generator=generator, **link)
        noise = float(la.sigma_noise) ** 2
        methods = {
            "map": regression_scores(outputs, torch.full_like(outputs, noise), y),
            "laplace": regression_scores(mean, variance + noise, y),
        }
    else:
        laplace = la(x, pred_type=config.pred_type, generator=generator, **link)
        methods = {
            name: classification_scores(probs, y if split == "test" else probs.argmax(-1))
            for name, probs in (("map", outputs.softmax(-1)), ("laplace", laplace))
        }
    for method, scores in methods.items():
        for name, values in scores.items():
            if split == "test" or name == "confidence":
                yield f"{method}/{name}", values


def summarize(context: Any, key: str, chosen: dict[str, Any], shards: dict[str, list[str]]) -> dict[str, Any]:
    """Join the shards' scores in order, compute the metrics of both methods, and commit them.

    Args:
        context: The worker's store.
        key: Where the metrics go.
        chosen: `settings(...)`.
        shards: For each split, the shards' ids in order.
    """
    metrics = {}
    for method in ("map", "laplace"):
        joined = {split: _joined(context.store, key, split, ids, method) for split, ids in shards.items()}
        test = joined.pop("test")
        if context.config.likelihood == "regression":
            metrics[method] = summarize_regression(test)
        else:
            metrics[method] = summarize_classification(test, {name: s["confidence"] for name, s in joined.items()})
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "settings": chosen,
        "shards": shards,
        "metrics": metrics,
    }
    context.store.create(key, seal_json(manifest))
    return {}


def _joined(store: Any, key: str, split: str, ids: list[str], method: str) -> dict[str, Tensor]:
    """Return the scores of one method over a whole split."""
    found: dict[str, list[np.ndarray]] = {}
    for shard in ids:
        name = evaluation_shard_key(key, split, shard)
        manifest = open_json(store.read(name), name)
        for array, entry in manifest["arrays"].items():
            if array.startswith(f"{method}/"):
                values = store.read_array(manifest["prefix"], array, entry)
                found.setdefault(array.removeprefix(f"{method}/"), []).append(values)
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


def metrics_json(version: str, tuning: str | None, metrics: Mapping[str, Any]) -> bytes:
    """Return the content of `evaluation/metrics.json`: the latest metrics, and of what they are."""
    return json.dumps({"version": version, "tuning": tuning, **metrics}, indent=1).encode()
