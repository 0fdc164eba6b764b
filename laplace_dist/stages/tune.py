"""Choose prior precision, noise and temperature of a posterior version: by the evidence in one task, or on validation data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from laplace.evidence import maximize_evidence
from laplace.likelihoods.comparison import not_worse, paired_differences
from laplace.scoring import loss_under_noise, score_candidates
from laplace.search import TOLERANCE
from laplace_dist.config.compatibility import link_approx
from laplace_dist.config.settings import Config
from laplace_dist.plan.segments import Segment
from laplace_dist.run.layout import tuning_shard_key
from laplace_dist.run.provenance import environment
from laplace_dist.run.tunings import Values, commit_shard, commit_tuning, joined_rows
from laplace_dist.stages.context import Context

STEPS, RATE = 100, 0.1  # of Adam on the logarithm of what is tuned


def settings(
    config: Config, validation: Mapping[str, Any] | None, device_type: str = "cpu", prior_of: str | None = None
) -> dict[str, Any]:
    """Return what the bits of a tuning depend on beside the posterior version.

    Args:
        config: The job's settings.
        validation: Fingerprint of the validation split, if it is scored; None for the evidence.
        device_type: Where the workers compute: `cpu` or `cuda`.
        prior_of: The tuning whose prior a search of the temperature alone keeps, if there is one.
    """
    machine = config.machine(device_type)
    if validation is None:
        return {"method": "marglik", "structure": config.prior_structure, "steps": STEPS, "rate": RATE, **machine}
    names = ("link_approx", "pred_type", "batch_size", "seed", "level", "draws")
    chosen = {name: getattr(config, name) for name in names}
    if config.searches_prior:
        chosen |= {"method": "gridsearch", "grid_size": config.grid_size, "prior_range": config.prior_range}
        chosen |= {"temperature": config.recalibrate == "both"}
    else:
        chosen |= {"method": "temperature", "prior_of": prior_of}
    return {**chosen, **config.batching, **machine, "data": validation}


def settings_of_comparison(
    config: Config, validation: Mapping[str, Any], device_type: str, evidence: str
) -> dict[str, Any]:
    """Return what the bits of a comparison of the evidence's choice with MAP depend on beside the posterior version.

    Args:
        config: The job's settings.
        validation: Fingerprint of the validation split.
        device_type: Where the workers compute: `cpu` or `cuda`.
        evidence: Key of the tuning by the evidence.
    """
    names = ("link_approx", "pred_type", "batch_size", "seed", "level", "draws", "grid_size", "prior_range")
    chosen = {name: getattr(config, name) for name in names}
    chosen |= {"method": "marglik", "structure": config.prior_structure, "evidence": evidence}
    return {**chosen, **config.batching, **config.machine(device_type), "data": validation}


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
        with _left_as_found(context.posterior(self.version)) as la:
            start = la.initial_prior_precision(1.0, self.chosen["structure"])
            noise = 1.0 if la.likelihood_object.has_noise else None
            la.prior_precision, noise = maximize_evidence(la, start, noise, n_steps=STEPS, lr=RATE)
            if noise is not None:
                la.sigma_noise = noise
            made = environment(context.device)
            return commit_tuning(context.store, context.plan, self.key, self.chosen, la, environment=made)


@dataclass(frozen=True)
class ScoreShard(_Tuning):
    """Score the values of a round, and MAP, on one shard of the validation split and commit the sums.

    Attributes:
        shard: The shard.
        values: The values.
        start: The tuning whose prior is kept where the round has none.
    """

    shard: Segment
    values: Values
    start: str | None

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"validation shard {self.shard} of round {self.values.number + 1}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        shard, config, values = self.shard, context.config, self.values
        batches = ((x, y) for _, x, y in context.batches("val", self.chosen["data"], shard.start, shard.stop))
        la = context.posterior(self.version, self.start)
        with _left_as_found(la):
            if la.likelihood_object.scales_logits:
                la.logit_temperature = 1.0
            if la.likelihood_object.has_noise and not values.priors:  # scored in units of the noise's precision
                la.prior_precision = la.prior_precision * la.sigma_noise**2
            found = score_candidates(
                la,
                batches,
                values.priors or None,
                values.temperatures,
                link_approx=link_approx(config),
                pred_type=config.tuned_pred_type,
                seed=config.seed + shard.start,
                keep=values.keep,
                open_noise=la.likelihood_object.has_noise,
                offset=shard.start,
            )
        commit_shard(
            context.store,
            context.plan,
            tuning_shard_key(self.key, values.shard(shard.id)),
            found.totals,
            found.n,
            environment(context.device),
            of_map=found.map_totals,
            values=values,
            examples=found.examples,
            fixed=found.fixed,
        )
        return {"examples": shard.stop - shard.start}


@dataclass(frozen=True)
class Candidate:
    """A value that was scored example by example.

    Attributes:
        values: Its round.
        row: Its place in the round.
        loss: Its mean loss.
        noise: The observation noise that goes with it, where there is one, and that of MAP.
    """

    values: Values
    row: int
    loss: float
    noise: tuple[float, float] | None = None


@dataclass(frozen=True)
class FirstNoWorse(_Tuning):
    """Find the first of some candidates that is not shown to be worse than MAP, by paired bootstrap over the examples.

    Attributes:
        candidates: The best ones first.
        shards: Ids of the validation split's shards in order.
    """

    candidates: tuple[Candidate, ...]
    shards: tuple[str, ...]
    what = "comparison with MAP"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has its number, or None, and its differences from MAP, or the first one's if there is none."""
        first: dict[str, Any] | None = None
        for number, candidate in enumerate(self.candidates):
            found = self._differences(context, candidate)
            plain = {name: asdict(difference) for name, difference in found.items()}
            if not_worse(found, TOLERANCE):
                return {"number": number, "compared": plain}
            first = first or plain
        return {"number": None, "compared": first}

    def _differences(self, context: Context, candidate: Candidate) -> Mapping[str, Any]:
        one, of_map = joined_rows(context.store, self.key, self.shards, candidate.values, candidate.row)
        if candidate.noise is not None:
            one, of_map = (
                {"nll": loss_under_noise(rows["spread"], rows["error"], noise)}
                for rows, noise in zip((one, of_map), candidate.noise, strict=True)
            )
        config = context.config
        return paired_differences(one, of_map, draws=config.draws, level=config.level, seed=config.seed)


@dataclass(frozen=True)
class CommitChoice(_Tuning):
    """Commit what a search has found.

    Attributes:
        prior: The prior precision; None keeps that of `start`.
        noise: The observation noise, where there is one.
        temperature: Of the logits.
        start: The tuning whose prior is kept.
        shards: Ids of the shards of scores.
        search: How it was found.
    """

    prior: float | None
    noise: float | None
    temperature: float
    start: str | None
    shards: tuple[str, ...]
    search: dict[str, Any]
    what = "tuning of the prior precision"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        with _left_as_found(context.posterior(self.version, self.start)) as la:
            if self.prior is not None:
                la.prior_precision = self.prior
            if self.noise is not None:
                la.sigma_noise = self.noise
            if la.likelihood_object.scales_logits:
                la.logit_temperature = self.temperature
            made = environment(context.device)
            return commit_tuning(
                context.store,
                context.plan,
                self.key,
                self.chosen,
                la,
                self.shards,
                environment=made,
                search=self.search,
            )


@contextmanager
def _left_as_found(la: Any) -> Iterator[Any]:
    """Give a posterior that is kept between tasks back as it was."""
    before = la.prior_precision, la.sigma_noise, la.logit_temperature
    try:
        yield la
    finally:
        la.prior_precision, la.sigma_noise, la.logit_temperature = before
