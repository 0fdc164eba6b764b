"""Committed evaluations, and the shards of scores that they were made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import EVALUATIONS, METRICS, attempt_prefix, evaluation_shard_key
from laplace_dist.run.ownership import commit
from laplace_dist.storage.store import Store

MONITOR = "monitor"  # in place of a method: what is watched for drift
GROUP = "group"  # array of a shard: numbers of the groups whose names its manifest has


def commit_shard(
    store: Store,
    plan: Plan,
    key: str,
    arrays: Mapping[str, np.ndarray],
    environment: Mapping[str, Any],
    groups: Sequence[str] = (),
) -> None:
    """Commit the scores of the examples of one shard, unless they are there.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        key: `layout.evaluation_shard_key(...)`.
        arrays: One value per example, by `method/score`; and what a report draws beside them, by `details/method/name`.
        environment: Where they were made.
        groups: Names of the examples' groups, if the data give any.
    """
    names = sorted(set(groups))
    if groups:
        place = {name: float(number) for number, name in enumerate(names)}
        arrays = {**arrays, GROUP: np.array([place[name] for name in groups])}
    prefix = attempt_prefix(key, new_attempt())
    entries = store.write_arrays(prefix, arrays)
    manifest = {"format_version": FORMAT_VERSION, "key": key, "plan": plan.digest, "prefix": prefix, "arrays": entries}
    manifest["environment"] = dict(environment)
    if groups:
        manifest["groups"] = names
    if not commit(store, plan, key, manifest):
        store.delete_tree(prefix)


def commit_evaluation(
    store: Store,
    plan: Plan,
    key: str,
    chosen: Mapping[str, Any],
    shards: Mapping[str, Any],
    metrics: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> None:
    """Commit the metrics of an evaluation, unless they are there."""
    manifest = {"format_version": FORMAT_VERSION, "key": key, "plan": plan.digest, "settings": dict(chosen)}
    commit(
        store,
        plan,
        key,
        {**manifest, "shards": dict(shards), "metrics": dict(metrics), "environment": dict(environment)},
    )


def joined_scores(store: Any, key: str, split: str, ids: list[str], method: str) -> dict[str, Tensor]:
    """Return the scores of one method over a whole split; what lies beside them is that of `details/method`."""
    found: dict[str, list[np.ndarray]] = {}
    for shard in ids:
        name = evaluation_shard_key(key, split, shard)
        manifest = open_json(store.read(name), name)
        for array, entry in manifest["arrays"].items():
            if array.startswith(f"{method}/"):
                values = store.read_array(manifest["prefix"], array, entry)
                found.setdefault(array.removeprefix(f"{method}/"), []).append(values)
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


def joined_groups(store: Any, key: str, ids: list[str]) -> list[str]:
    """Return the groups of the examples of the test split; nothing if they have none."""
    found: list[str] = []
    for shard in ids:
        name = evaluation_shard_key(key, "test", shard)
        manifest = open_json(store.read(name), name)
        if not (names := manifest.get("groups")):
            return []
        codes = store.read_array(manifest["prefix"], GROUP, manifest["arrays"][GROUP])
        found += [names[int(code)] for code in codes]
    return found


def metrics_json(version: str, tuning: str | None, metrics: Mapping[str, Any]) -> bytes:
    """Return the content of `evaluation/metrics.json`: the latest metrics, and of what they are."""
    return json.dumps({"version": version, "tuning": tuning, **metrics}, indent=1).encode()


def is_watched(store: Store, key: str) -> bool:
    """Say whether the scores of an evaluation's test split have what is watched for drift; those of older versions do not."""
    shard = evaluation_shard_key(key, "test", open_json(store.read(key), key)["shards"]["test"][0])
    return any(name.startswith(f"{MONITOR}/") for name in open_json(store.read(shard), shard)["arrays"])


def committed_evaluations(store: Store) -> list[str]:
    """Return the keys of all evaluations of a run."""
    there = store.list(EVALUATIONS, recursive=False)
    return [key for key in there if key.endswith(".json") and key != METRICS]


def shown(store: Store) -> str | None:
    """Return the key of the evaluation that `evaluation/metrics.json` repeats, or None where there is none."""
    try:
        found = json.loads(store.read(METRICS))
        version, tuning = found.pop("version"), found.pop("tuning")
    except (MissingObjectError, ValueError, KeyError, TypeError, AttributeError):
        return None  # which a verification names
    for key in committed_evaluations(store):
        if key.startswith(f"{EVALUATIONS}/{version}-"):
            sealed = open_json(store.read(key), key)
            if sealed["metrics"] == found and sealed["settings"].get("tuning") == tuning:
                return key
    return None
