"""The columns of a report: MAP, Laplace and, after a recalibration, the other posterior, scored on the same examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laplace_dist.errors import MissingObjectError
from laplace_dist.plan.plan import Plan
from laplace_dist.run import ownership
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.evaluations import joined_groups, joined_scores, shown
from laplace_dist.run.layout import EVALUATIONS
from laplace_dist.storage.store import Store

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Column:
    """One set of predictions on the test split.

    Attributes:
        name: `MAP`, `Laplace`, `previous` or `candidate`.
        style: How it is drawn: `map`, `laplace` or `other`.
        metrics: As committed, by name.
        scores: One value per example, by score.
        details: What is drawn beside them, one row per example; empty where the evaluation did not keep it.
        outside: Confidences by out-of-distribution split.
    """

    name: str
    style: str
    metrics: dict[str, float]
    scores: Arrays
    details: Arrays = field(default_factory=dict)
    outside: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """What a report shows of an evaluation.

    Attributes:
        key: Of the evaluation.
        columns: MAP, Laplace and maybe another posterior.
        groups: Of the test examples; empty where the data give none.
        settings: What the evaluation depends on.
        notes: What cannot be shown, and why, in a person's words.
    """

    key: str
    columns: list[Column]
    groups: list[str]
    settings: dict[str, Any]
    notes: list[str]


def evaluated(store: Store, plan: Plan, key: str, other: tuple[str, str] | None = None) -> Evaluated:
    """Read an evaluation with the scores of every example.

    Args:
        store: The checkpoint.
        plan: Of the run.
        key: Of the evaluation.
        other: Name and evaluation of another posterior that was scored on the same examples.

    Raises:
        CheckpointError: Something of it is missing, truncated or altered.
    """
    manifest = open_json(store.read(key), key)
    columns = [_column(store, key, manifest, "MAP", "map"), _column(store, key, manifest, "Laplace", "laplace")]
    notes = []
    if other is not None:
        name, beside = other
        try:
            third = _column(store, beside, open_json(store.read(beside), beside), name, "other")
            if alike(third, columns[1]):
                columns.append(third)
            else:
                notes.append(f"The {name} posterior was scored on other examples or splits, so it has no column.")
        except MissingObjectError:
            notes.append(f"The scores of the {name} posterior are not kept any more, so it has no column.")
    groups = joined_groups(store, key, manifest["shards"]["test"])
    if manifest["settings"].get("groups") and not groups:
        notes.append("The data give groups, but not one score for each example, so there are no slices.")
    if "squared_error" in columns[0].scores and "covered_90" in columns[0].scores and not columns[0].details:
        notes.append(
            "This evaluation kept the scores of each example but not its prediction, so there is no calibration curve and "
            f"no residual plot. Delete {key} with its folder, and run jobs/evaluate.py."
        )
    return Evaluated(key, columns, groups, manifest["settings"], notes)


def alike(one: Column, other: Column) -> bool:
    """Say whether two columns have the same metrics of as many examples, so that they can stand beside each other."""
    sizes = [{split: len(values) for split, values in column.outside.items()} for column in (one, other)]
    same = one.metrics.keys() == other.metrics.keys() and one.scores.keys() == other.scores.keys()
    return same and sizes[0] == sizes[1] and len(one.scores["nll"]) == len(other.scores["nll"])


def _column(store: Store, key: str, manifest: Mapping[str, Any], name: str, style: str) -> Column:
    method = "map" if style == "map" else "laplace"
    shards = dict(manifest["shards"])
    test = shards.pop("test")
    shards.pop(manifest["settings"].get("unlabelled"), None)  # not out of distribution, as far as anybody knows
    outside = {}
    for split, ids in shards.items():
        confidence = joined_scores(store, key, split, ids, method).get("confidence")
        if confidence is not None:
            outside[split] = confidence.numpy()
    scores = {score: values.numpy() for score, values in joined_scores(store, key, "test", test, method).items()}
    details = joined_scores(store, key, "test", test, f"details/{method}")
    kept = {detail: values.numpy() for detail, values in details.items()}
    return Column(name, style, manifest["metrics"][method], scores, kept, outside)


def latest(store: Store, plan: Plan, current: Mapping[str, Any], decisions: list[dict[str, Any]]) -> str | None:
    """Return the key of the evaluation to show of the current posterior, or None if there is none.

    That of the latest recalibration that scored it, on fresh data; else the one that `evaluation/metrics.json` is of.

    Args:
        store: The checkpoint.
        plan: Of the run.
        current: `CURRENT.json`.
        decisions: What recalibrations have found, the oldest first.
    """
    for decision in reversed(decisions):
        for side in (decision["candidate"], decision["current"]):
            same = (side["version"], side["tuning"]) == (current["version"], current["tuning"])
            if same and ownership.has(store, plan, side["evaluation"]):
                return side["evaluation"]
    key = shown(store)
    if key is None or not key.startswith(f"{EVALUATIONS}/{current['version']}-"):
        return None
    found = open_json(store.read(key), key)
    mine = not ownership.of_another(found, plan) and found["settings"].get("tuning") == current["tuning"]
    return key if mine else None
