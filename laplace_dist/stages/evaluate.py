"""MAP and Laplace side by side: per-example scores of shards, committed as arrays, then summarised in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace.drift.features import LastInputs
from laplace.likelihoods.checks import check_scored_finite
from laplace.linalg.precision import widened
from laplace.predictive import prediction
from laplace_dist.config.compatibility import link_approx
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.data.groups import digest_of
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run.evaluations import MONITOR, commit_evaluation, commit_shard, joined_scores
from laplace_dist.run.layout import evaluation_shard_key
from laplace_dist.run.ownership import has
from laplace_dist.run.provenance import environment
from laplace_dist.stages.context import Context
from laplace_dist.storage.store import Store


def settings(
    config: Config,
    tuning: str | None,
    data: Mapping[str, Any],
    device_type: str = "cpu",
    groups: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what the bits of an evaluation depend on beside the posterior version.

    Args:
        config: The job's settings.
        tuning: Key of the tuning that is in force, or None.
        data: Fingerprints of the splits by name.
        device_type: Where the workers compute: `cpu` or `cuda`.
        groups: Those of the test examples, if the data give any.
    """
    names = ("link_approx", "pred_type", "batch_size", "seed")
    chosen = {name: getattr(config, name) for name in names}
    if config.unlabelled is not None:  # of which more is kept than of one out of distribution
        chosen["unlabelled"] = config.unlabelled
    if groups:
        chosen["groups"] = digest_of(groups)
    return {**chosen, **config.batching, **config.machine(device_type), "tuning": tuning, "data": dict(data)}


@dataclass(frozen=True)
class EvaluateShard:
    """Score MAP and Laplace on one shard of a split and commit the scores of its examples.

    Attributes:
        plan: Digest of the plan.
        version: Posterior version.
        tuning: Key of a tuning, or None for the default prior.
        key: Key of the evaluation's metrics.
        split: `test`; an out-of-distribution split, of which only the confidence is kept; or the one without labels.
        data: Fingerprint of the split.
        shard: The shard.
        groups: Those of its examples, if the data give any.
    """

    plan: str
    version: str
    tuning: str | None
    key: str
    split: str
    data: dict[str, Any]
    shard: Segment
    groups: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"{self.split} shard {self.shard}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        shard, la = self.shard, context.posterior(self.version, self.tuning)
        found: dict[str, list[Tensor]] = {}
        apart = bool(self.groups)
        for offset, x, y in context.batches(self.split, self.data, shard.start, shard.stop):
            for name, scores in _batch_scores(context, la, x, y, offset, self.split):
                found.setdefault(name, []).append(scores.cpu())
            apart = apart and one_score_each(la.likelihood_object, y, found["map/nll"][-1])
        arrays = {name: torch.cat(parts).numpy() for name, parts in found.items()}
        key = evaluation_shard_key(self.key, self.split, shard.id)
        groups = self.groups if apart else ()
        commit_shard(context.store, context.plan, key, arrays, environment(context.device), groups)
        return {"examples": shard.stop - shard.start}


@dataclass(frozen=True)
class Summarize:
    """Join the shards' scores in order, compute the metrics of both methods, and commit them.

    Attributes:
        plan: Digest of the plan.
        key: Where the metrics go.
        chosen: `settings(...)`.
        shards: For each split, the shards' ids in order.
    """

    plan: str
    key: str
    chosen: dict[str, Any]
    shards: dict[str, list[str]]
    what = "summary of the scores"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        metrics = {method: self._metrics(context, method) for method in ("map", "laplace")}
        made = environment(context.device)
        commit_evaluation(context.store, context.plan, self.key, self.chosen, self.shards, metrics, made)
        return {}

    def _metrics(self, context: Context, method: str) -> dict[str, float]:
        joined = {
            split: joined_scores(context.store, self.key, split, ids, method) for split, ids in self.shards.items()
        }
        test = joined.pop("test")
        likelihood = likelihood_of(context.config.likelihood)
        outside = {name: scores["confidence"] for name, scores in joined.items() if name != context.config.unlabelled}
        return likelihood.summarize(test, outside)


def shard_tasks(
    store: Store,
    plan: Plan,
    version: str,
    tuning: str | None,
    key: str,
    data: Mapping[str, dict[str, Any]],
    shards: Sequence[tuple[str, Segment]],
    groups: Sequence[str] = (),
) -> tuple[list[EvaluateShard], int]:
    """Return a task for every shard, given as `(split, shard)`, that has no committed scores, and how many have some.

    Of the test split with the groups of its examples, if the data give any.
    """
    left = [
        (split, shard) for split, shard in shards if not has(store, plan, evaluation_shard_key(key, split, shard.id))
    ]
    tasks = [
        EvaluateShard(
            plan.digest,
            version,
            tuning,
            key,
            split,
            data[split],
            shard,
            tuple(groups[shard.start : shard.stop]) if split == "test" else (),
        )
        for split, shard in left
    ]
    return tasks, len(shards) - len(left)


def one_score_each(likelihood: Any, y: Tensor, scores: Tensor) -> bool:
    """Say whether the examples of a batch have one score each, so that those of a group can be told."""
    return len(scores) == len(y) and (y.ndim == 1 or not likelihood.has_confidence)


@torch.no_grad()
def _batch_scores(context: Any, la: Any, x: Any, y: Tensor, offset: int, split: str) -> Iterator[tuple[str, Tensor]]:
    """Yield `(method/score, values)` for one batch; what is sampled is seeded by the batch's place in the split."""
    config, likelihood = context.config, la.likelihood_object
    generator = torch.Generator(context.device).manual_seed(config.seed + offset)
    with LastInputs(context.model) as last:
        outputs = context.model(x)
    labelled, noise = split == "test", float(la.sigma_noise)
    check_scored_finite("The model's output", outputs, offset)
    if labelled:
        likelihood.check_shapes(outputs, y, offset)
    laplace = prediction(
        la,
        likelihood,
        x,
        config.pred_type,
        link_approx(config),
        diagonal_output=likelihood.predicts_outputs,
        generator=generator,
    )
    for method, found in (("map", likelihood.at(widened(outputs))), ("laplace", laplace)):
        if labelled:
            scores = likelihood.scores(found, y, noise)
            for name, values in likelihood.details(found, y, noise).items():
                yield f"details/{method}/{name}", values
        else:
            scores = {"confidence": likelihood.confidences(found)} if likelihood.has_confidence else {}
        for name, values in scores.items():
            if len(values) % len(outputs) == 0:
                check_scored_finite(f"The {name} of {method}", values.reshape(len(outputs), -1), offset)
            yield f"{method}/{name}", values
    if labelled or split == config.unlabelled:
        watched = likelihood.monitored(laplace, y if labelled else None, noise)
        watched |= {"loss": scores["nll"]} if labelled else {}
        for name, values in watched.items():
            if (each := _per_example(name, values, outputs)) is not None:
                yield f"{MONITOR}/{name}", each
        if (features := last.projected()) is not None:
            yield f"{MONITOR}/features", features.float()


def _per_example(name: str, values: Tensor, outputs: Tensor) -> Tensor | None:
    """Return the mean over an example's terms, such as positions of a sequence; None where terms were left out of some.

    A class has no mean: where there are several there is none.
    """
    batch = len(outputs)
    if len(values) == batch:
        return values
    terms = outputs[..., 0].numel(), outputs.numel()
    return values.reshape(batch, -1).mean(1) if len(values) in terms and name in ("entropy", "loss") else None
