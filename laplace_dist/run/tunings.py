"""Committed tunings of prior precision, noise and temperature, and the shards of scores that they were made of."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laplace_dist.errors import CheckpointError
from laplace_dist.plan.plan import FORMAT_VERSION, Plan
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.layout import attempt_prefix, tuning_shard_key
from laplace_dist.run.ownership import commit
from laplace_dist.storage.store import Store

EXAMPLES = "examples"  # of a round's shard: scores by name, value and term
_REMEDY = "Delete it and run the same command again."


@dataclass(frozen=True)
class Values:
    """What one round of a search scores.

    Attributes:
        number: Of the round.
        priors: Scalar prior precisions; where there are none, that of the tuning that the search starts from.
        temperatures: Of the logits.
        keep: The scores of every example are kept.
    """

    number: int
    priors: tuple[float, ...]
    temperatures: tuple[float, ...]
    keep: bool

    def shard(self, shard: str) -> str:
        """Return the id of a shard of the validation split in this round."""
        return f"r{self.number}-{shard}"

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON holds them."""
        return {"priors": list(self.priors), "temperatures": list(self.temperatures)}


def read_shard(store: Store, key: str, values: Values | None = None) -> tuple[Tensor, Tensor, int, bool]:
    """Return the summed losses of one shard for every value, those of the MAP, the number of terms, and whether they are fixed.

    Args:
        store: The checkpoint.
        key: `layout.tuning_shard_key(...)`.
        values: What was scored, if it is to be checked.

    Raises:
        CheckpointError: It is missing, truncated or altered.
    """
    text = open_json(store.read(key), key)["scores"]
    try:
        scores = json.loads(text)
        totals = torch.tensor(scores["totals"], dtype=torch.float64)
        of_map, n = torch.tensor(scores.get("map", []), dtype=torch.float64), scores["n"]
        fixed = scores.get("fixed", False)
        stored = {name: scores.get(name) for name in ("priors", "temperatures")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{key} is altered: it holds no scores. {_REMEDY}") from error
    shaped = totals.ndim in (1, 2) and of_map.ndim == 1 and type(n) is int and n > 0 and type(fixed) is bool
    wrong = values is not None and (
        stored != values.plain() or totals.shape != (max(1, len(values.priors)), len(of_map)) or not len(of_map)
    )
    if not shaped or wrong:
        raise CheckpointError(f"{key} is altered: its scores are not those of this grid. {_REMEDY}")
    return totals, of_map, n, fixed


def commit_shard(
    store: Store,
    plan: Plan,
    key: str,
    totals: Tensor,
    n: int,
    environment: Mapping[str, Any],
    *,
    of_map: Tensor | None = None,
    values: Values | None = None,
    examples: Mapping[str, Tensor] | None = None,
    fixed: bool = False,
) -> None:
    """Commit the summed losses of one shard, unless they are there.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        key: `layout.tuning_shard_key(...)`.
        totals: For every value.
        n: Number of terms.
        environment: Where they were made.
        of_map: Those of the MAP.
        values: What was scored.
        examples: By name, the scores of every term, `(values + 1, terms)`; the MAP's come last.
        fixed: No prior precision changes them.
    """
    # Scores may be infinite, where the sealed JSON of manifests allows numbers only.
    scores = {"totals": totals.tolist(), "n": n, **(values.plain() if values else {})}
    if of_map is not None:
        scores["map"] = of_map.tolist()
    if examples:
        scores["names"] = list(examples)
    if fixed:
        scores["fixed"] = True
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "plan": plan.digest,
        "scores": json.dumps(scores),
        "environment": dict(environment),
    }
    prefix = None
    if examples:
        prefix = attempt_prefix(key, new_attempt())
        arrays = {EXAMPLES: np.stack([rows.numpy() for rows in examples.values()])}
        manifest |= {"prefix": prefix, "arrays": store.write_arrays(prefix, arrays)}
    if not commit(store, plan, key, manifest) and prefix is not None:
        store.delete_tree(prefix)


def joined_rows(
    store: Store, key: str, shards: Sequence[str], values: Values, row: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scores of one value of a round, and of the MAP, over the whole validation split."""
    one: dict[str, list[np.ndarray]] = {}
    of_map: dict[str, list[np.ndarray]] = {}
    for shard in shards:
        name = tuning_shard_key(key, values.shard(shard))
        manifest = open_json(store.read(name), name)
        rows = store.read_array(manifest["prefix"], EXAMPLES, manifest["arrays"][EXAMPLES])
        for place, score in enumerate(json.loads(manifest["scores"])["names"]):
            one.setdefault(score, []).append(rows[place, row])
            of_map.setdefault(score, []).append(rows[place, -1])
    first, second = (
        {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()} for found in (one, of_map)
    )
    return first, second


def commit_tuning(
    store: Store,
    plan: Plan,
    key: str,
    chosen: Mapping[str, Any],
    la: Any,
    shards: Collection[str] = (),
    *,
    environment: Mapping[str, Any],
    search: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Create the manifest of a tuning with what the object has now, unless it exists.

    Args:
        store: The checkpoint.
        plan: Plan of the run.
        key: `layout.tuning_key(...)`.
        chosen: The settings that it depends on.
        la: The posterior with the prior precision, noise and temperature that were chosen.
        shards: Ids of the shards of scores that it was made of.
        environment: Where it was made.
        search: How they were found on validation data, as `schemas.TuningSearch` has it.
    """
    prefix = attempt_prefix(key, new_attempt())
    values = np.ascontiguousarray(la.prior_precision.detach().cpu().numpy())
    law = la.likelihood_object
    noise = float(la.sigma_noise) if law.has_noise else None
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
    if law.scales_logits:
        manifest["logit_temperature"] = la.logit_temperature
    if search is not None:
        manifest["search"] = dict(search)
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
    """Give a fitted object the prior precision, the observation noise and the temperature of its logits of a tuning."""
    manifest, prior_precision = read_tuning(store, key)
    la.prior_precision = prior_precision
    if manifest["sigma_noise"] is not None:
        la.sigma_noise = manifest["sigma_noise"]
    if manifest.get("logit_temperature") is not None:
        la.logit_temperature = manifest["logit_temperature"]


def start_of(store: Store, key: str | None) -> str | None:
    """Return the tuning whose prior a tuning of the temperature alone has kept; any other tuning is its own.

    So that a temperature that is tuned again is the same tuning; if the other one was collected meanwhile, it is a new one.
    """
    first = None if key is None else open_json(store.read(key), key)["settings"].get("prior_of", key)
    return first if first is None or store.exists(first) else key


def notes(manifest: Mapping[str, Any]) -> list[str]:
    """Return what people should know beside the metrics: which noise, temperature or limit these are of."""
    return [*(manifest.get("search") or {}).get("said", []), *beside(manifest)]


def beside(manifest: Mapping[str, Any], who: str = "Laplace", with_map: bool = True) -> list[str]:
    """Return which noise or temperature figures are of.

    Args:
        manifest: Of the tuning; with `sigma_noise` alone where there is none.
        who: Whose figures they are.
        with_map: Those of MAP are beside them, of the same noise.
    """
    found = []
    if (noise := manifest["sigma_noise"]) is not None:
        kind = "the tuned observation noise" if "settings" in manifest else "an observation noise that nobody has tuned"
        found.append(f"The NLL of {'MAP and of ' if with_map else ''}{who} is that under {kind}, {noise:.4g}.")
    if (temperature := manifest.get("logit_temperature") or 1.0) != 1:
        found.append(f"The logits of {who} are divided by the temperature {temperature:.4g}; those of MAP are not.")
    return found


def method_of(manifest: Mapping[str, Any]) -> str | None:
    """Return how a prior was chosen: by a search too, where what the evidence has chosen was shown to be worse than MAP."""
    method, search = manifest["settings"].get("method"), manifest.get("search") or {}
    searched = any(scored["priors"] for scored in search.get("rounds", []))
    return "gridsearch" if method == "marglik" and searched else method


def helps(manifest: Mapping[str, Any]) -> bool:
    """Say whether a tuning has found anything better than MAP, as far as it has looked."""
    return (manifest.get("search") or {}).get("helps", True)


def curve(manifest: Mapping[str, Any]) -> list[tuple[float, float | None]]:
    """Return the mean loss on all validation data over the prior precision, lowest over temperatures; None where infinite."""
    found: dict[float, float] = {}
    for scored in (manifest.get("search") or {}).get("rounds", []):
        if scored["coarse"] or not scored["priors"]:
            continue
        losses = [math.inf if loss is None else loss for loss in scored["losses"]]
        width = len(losses) // len(scored["priors"])
        units = [noise**2 for noise in scored.get("noises", [])] or [1.0] * len(scored["priors"])
        for i, prior in enumerate(prior / unit for prior, unit in zip(scored["priors"], units, strict=True)):
            found[prior] = min([*losses[i * width : (i + 1) * width], found.get(prior, math.inf)])
    return [(prior, loss if math.isfinite(loss) else None) for prior, loss in sorted(found.items())]
