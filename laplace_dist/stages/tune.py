"""Choose the prior precision of a posterior version: by the evidence in one task, or over shards of validation data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laplace.evidence import maximize_evidence
from laplace.tuning import prior_precision_grid, score_grid, select_prior_precision
from laplace_dist.config.compatibility import link_approx
from laplace_dist.config.settings import Config
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run.layout import tuning_shard_key
from laplace_dist.run.ownership import has
from laplace_dist.run.provenance import environment
from laplace_dist.run.tunings import commit_shard, commit_tuning, read_shard
from laplace_dist.stages.context import Context
from laplace_dist.storage.store import Store

STEPS, RATE = 100, 0.1  # of Adam on the logarithm of what is tuned


def settings(config: Config, validation: Mapping[str, Any] | None, device_type: str = "cpu") -> dict[str, Any]:
    """Return what the bits of a tuning depend on beside the posterior version.

    Args:
        config: The job's settings.
        validation: Fingerprint of the validation split, for the grid search.
        device_type: Where the workers compute: `cpu` or `cuda`.
    """
    machine = config.machine(device_type)
    if config.tuning == "marglik":
        return {"method": "marglik", "structure": config.prior_structure, "steps": STEPS, "rate": RATE, **machine}
    names = ("grid_size", "link_approx", "pred_type", "batch_size", "seed")
    chosen = {name: getattr(config, name) for name in names}
    return {"method": "gridsearch", **chosen, **config.batching, **machine, "data": validation}


@dataclass(frozen=True)
class _Tuning:
    """What the tasks of a tuning have in common.

    Attributes:
        plan: Digest of the plan.
        version: Posterior version.
        key: Key of the tuning's manifest.
        chosen: `settings(...)`.
    """

    plan: str
    version: str
    key: str
    chosen: dict[str, Any]


@dataclass(frozen=True)
class MaximizeEvidence(_Tuning):
    """Maximise the log marginal likelihood, together with the observation noise where there is one, and commit the result."""

    what = "tuning of the prior precision"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        la = context.posterior(self.version)
        start = la.initial_prior_precision(1.0, self.chosen["structure"])
        noise = 1.0 if la.likelihood_object.has_noise else None
        prior_precision, noise = maximize_evidence(la, start, noise, n_steps=STEPS, lr=RATE)
        la.prior_precision = prior_precision
        if noise is not None:
            la.sigma_noise = noise
        return commit_tuning(
            context.store, context.plan, self.key, self.chosen, la, environment=environment(context.device)
        )


@dataclass(frozen=True)
class ScoreShard(_Tuning):
    """Score every value of the grid on one shard of the validation split and commit the sums.

    Attributes:
        shard: The shard.
    """

    shard: Segment

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"validation shard {self.shard}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        shard, config = self.shard, context.config
        batches = ((x, y) for _, x, y in context.batches("val", self.chosen["data"], shard.start, shard.stop))
        totals, n = score_grid(
            context.posterior(self.version),
            batches,
            prior_precision_grid(size=config.grid_size),
            link_approx=link_approx(config),
            pred_type=config.pred_type,
            seed=config.seed + shard.start,
        )
        key = tuning_shard_key(self.key, shard.id)
        commit_shard(context.store, context.plan, key, totals, n, environment(context.device))
        return {"examples": shard.stop - shard.start}


@dataclass(frozen=True)
class ChooseFromGrid(_Tuning):
    """Add the shards' scores in order, choose the prior precision, and commit it.

    Attributes:
        shards: Ids of the shards in order.
    """

    shards: tuple[str, ...]
    what = "tuning of the prior precision"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has the warnings that people should see."""
        grid = prior_precision_grid(size=context.config.grid_size)
        total, count = torch.zeros_like(grid), 0
        for shard in self.shards:
            part, n = read_shard(context.store, tuning_shard_key(self.key, shard), len(grid))
            total, count = total + part, count + n
        la = context.posterior(self.version)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            la.prior_precision = select_prior_precision(grid, total / count)
        found = commit_tuning(
            context.store, context.plan, self.key, self.chosen, la, self.shards, environment=environment(context.device)
        )
        return {**found, "warnings": [str(warning.message) for warning in caught]}


def shard_tasks(
    store: Store, plan: Plan, version: str, key: str, chosen: dict[str, Any], shards: Sequence[Segment]
) -> tuple[list[ScoreShard], int]:
    """Return a task for every validation shard that has no committed scores, and how many shards have some."""
    left = [shard for shard in shards if not has(store, plan, tuning_shard_key(key, shard.id))]
    return [ScoreShard(plan.digest, version, key, chosen, shard) for shard in left], len(shards) - len(left)
