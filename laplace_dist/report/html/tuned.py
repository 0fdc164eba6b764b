"""How prior precision, noise and temperature were chosen: the NLL of the validation data over the prior, and warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from laplace.tuning import prior_precision_grid
from laplace_dist.errors import MissingObjectError
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import tuning_shard_key
from laplace_dist.run.tunings import beside, curve, method_of, read_tuning
from laplace_dist.storage.store import Store

SHOWN = 1000  # values of a prior precision with several
Curve = list[tuple[float, float | None]]


def tuned(store: Store, key: str | None) -> dict[str, Any] | None:
    """Return the choice, and the curve that it was made by if it was a search; None without a tuning.

    Raises:
        CheckpointError: The tuning is truncated or altered.
    """
    if key is None:
        return None
    manifest, value = read_tuning(store, key)
    settings, search = manifest["settings"], manifest.get("search")
    found = {
        "method": method_of(manifest),
        "prior_structure": settings.get("structure", "scalar"),
        "prior_precision": value.flatten()[:SHOWN].tolist(),
        "values": value.numel(),
        "sigma_noise": manifest["sigma_noise"],
        "temperature": manifest.get("logit_temperature"),
        "log_marginal_likelihood": manifest["log_marginal_likelihood"],
        "curve": _of_grid(store, key, manifest) if search is None else curve(manifest),
        "said": [] if search is None else list(search.get("said", [])),
        "beside": beside(manifest),
    }
    return {**found, "warning": _warning(found) if search is None else _limit(search)}


def _of_grid(store: Store, key: str, manifest: Mapping[str, Any]) -> Curve:
    """Return the mean NLL for every prior precision of a fixed grid, as tunings before searches had it."""
    if manifest["settings"].get("method") != "gridsearch":
        return []
    grid = prior_precision_grid(size=manifest["settings"]["grid_size"]).tolist()
    totals, count = [0.0] * len(grid), 0
    for shard in manifest["shards"]:
        name = tuning_shard_key(key, shard)
        try:
            scores = json.loads(open_json(store.read(name), name)["scores"])
        except MissingObjectError:  # of a run that keeps no shards
            return []
        totals = [total + own for total, own in zip(totals, scores["totals"], strict=True)]
        count += scores["n"]
    scores = [total / count if count and math.isfinite(total) else None for total in totals]
    return list(zip(grid, scores, strict=True))


def _warning(found: Mapping[str, Any]) -> str | None:
    """Say so where the best value is the first or the last of a fixed grid."""
    tried = [prior for prior, score in found["curve"] if score is not None]
    if not tried or found["values"] != 1:
        return None
    chosen = found["prior_precision"][0]
    for which, end, means in (("smallest", tried[0], "almost no prior"), ("largest", tried[-1], "almost MAP")):
        if math.isclose(chosen, end, rel_tol=1e-6):
            return (
                f"The chosen prior precision is the {which} that was tried, on the edge of the grid: the best one may lie "
                f"beyond it. The {which} is {means}."
            )
    return None


def _limit(search: Mapping[str, Any]) -> str | None:
    """Say what a search has ended at, if that was no optimum inside."""
    said = " ".join(search.get("said", []))
    edge = search.get("limit") is not None or search.get("helps") is False
    return said or "The search ended at the edge of what may be tried." if edge else None
