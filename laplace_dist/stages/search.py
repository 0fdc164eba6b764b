"""The driver's side of a tuning on validation data: rounds of scores, one pass each, until the best value is found.

What a round looks at follows from the scores of the rounds before it, which are committed: a search that was killed goes on,
and ends in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from laplace.scoring import lowest_over_temperatures, profile_noise
from laplace.search import TOLERANCE, Found, Lattice, Round, Scored, next_step
from laplace.temperature import TEMPERATURES, best_temperature
from laplace_dist.config.compatibility import link_approx
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.errors import RunFailed
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run.layout import tuning_shard_key
from laplace_dist.run.ownership import has
from laplace_dist.run.tunings import Values, read_shard, read_tuning
from laplace_dist.stages import words
from laplace_dist.stages.tune import Candidate, CommitChoice, FirstNoWorse, ScoreShard
from laplace_dist.storage.store import Store

ENOUGH, SHARE = 1000, 16  # examples that a coarse round looks at: at least so many, and one in so many
PROFILE = tuple(TEMPERATURES.value(i) for i in range(0, TEMPERATURES.size, 10))  # under which priors are scored
SURE = 1e-6  # nats by which the kept limit may differ from MAP


@dataclass(frozen=True)
class Outcome:
    """Where a search of the prior precision ended.

    Attributes:
        prior: Prior precision.
        noise: Observation noise, where there is one.
        where: As in `laplace.search.Found`.
    """

    prior: float
    noise: float | None
    where: str


@dataclass
class Search:
    """One tuning on validation data.

    Attributes:
        store: The checkpoint.
        plan: Plan of the run.
        version: Posterior version.
        key: Key of the tuning.
        chosen: `tune.settings(...)`.
        config: The job's settings.
        shards: Those of the validation split.
        start: The tuning whose prior is kept, if the temperature alone is searched.
        carry_out: Carries out tasks and returns their receipts; takes what they are, how many there are in all, and how many
            are done.
    """

    store: Store
    plan: Plan
    version: str
    key: str
    chosen: dict[str, Any]
    config: Config
    shards: Sequence[Segment]
    start: str | None
    carry_out: Callable[[Sequence[Any], str, int, int], list[Mapping[str, Any]]]
    _rounds: list[dict[str, Any]] = field(default_factory=list, init=False)
    _ids: list[str] = field(default_factory=list, init=False)
    _map_noise: float | None = field(default=None, init=False)
    _top: int | None = field(default=None, init=False)

    def choose(self) -> CommitChoice:
        """Search, compare with MAP, and return the task that commits the result.

        Raises:
            RunFailed: No value has a finite loss.
        """
        prior, temperature, candidates, said = None, 1.0, [], []
        both = self.config.recalibrate == "both"
        if self.config.searches_prior:
            prior, candidates = self._search_prior(PROFILE if both else (1.0,))
        scaled = self.config.recalibrate != "prior"
        if scaled:
            temperature, candidates = self._search_temperature(prior)
            if scaled := temperature is not None:
                said = []
            else:
                temperature, said = 1.0, [words.NO_TEMPERATURE]
                prior, candidates = self._search_prior((1.0,)) if prior is not None else (None, [])
        limit = None if prior is None else self._limit(prior.where)
        first, compared = self._first_no_worse(candidates) if candidates else (0, {})
        if first is None:
            prior, limit, compared, text = self._toward_map(prior, compared)
            temperature, said, helps = 1.0, [*said, *text], limit is None and self._limit_is_map
        else:
            if first > 0 and scaled:
                temperature = candidates[first].values.temperatures[candidates[first].row]
            elif first > 0:
                prior, limit = _outcome_of(candidates[first]), None
            said += words.passed_over(compared) if first > 0 else []
            helps = limit != "MAP" or temperature != 1
            said += words.ending(limit, prior and prior.prior, helps, self.config.prior_range)
        if not helps:
            said.append(words.advice(self.plan.settings, self.config))
        found = {"rounds": self._rounds, "limit": limit, "helps": helps, "compared": compared, "said": said}
        values = (None, None) if prior is None else (prior.prior, prior.noise)
        return CommitChoice(
            *self._common, *values, temperature, self.start, tuple(self._ids), {**found, "map_noise": self._map_noise}
        )

    def compare(self) -> CommitChoice:
        """Compare the prior of `start`, which the evidence has chosen, with MAP; search where that is shown to be better."""
        found = self._score(Round((0,), coarse=False), [], (1.0,), keep=True, by_prior=False)
        (candidate,) = _ranked([found]) or [None]
        if candidate is not None and candidate.noise is not None:
            noise = read_tuning(self.store, self.start)[0]["sigma_noise"]
            candidate = replace(candidate, noise=(noise, candidate.noise[1]))
        first, compared = (None, {}) if candidate is None else self._first_no_worse([candidate])
        if first is None:
            task = self.choose()
            search = {**task.search, "said": [words.evidence_is_worse(compared), *task.search["said"]]}
            return replace(task, search=search)
        kept = {"rounds": self._rounds, "limit": None, "helps": True, "compared": compared, "said": []}
        return CommitChoice(
            *self._common, None, None, 1.0, self.start, tuple(self._ids), {**kept, "map_noise": self._map_noise}
        )

    # -------------------------------------------------------------- the searches

    def _search_prior(self, temperatures: tuple[float, ...]) -> tuple[Outcome, list[Candidate]]:
        """Search the prior precision, each under the best of some temperatures."""
        lattice, done, scored, alone = self._lattice, [], [], len(temperatures) == 1
        while isinstance(step := _next(lattice, done), Round):
            found = self._score(step, [lattice.value(i) for i in step.indices], temperatures, keep=alone)
            done.append(found.scored)
            scored += [] if step.coarse else [found]
        noises = {i: noise for found in scored for i, noise in found.noises.items()}
        self._top = max(i for found in scored for i in found.scored.round.indices)
        return _outcome(lattice, step, noises), _ranked(scored) if alone else []

    def _search_temperature(self, prior: Outcome | None) -> tuple[float | None, list[Candidate]]:
        """Search the temperature, at the prior that was found, or that of the tuning before; None if none is best."""
        done, scored = [], []
        while isinstance(step := _next(TEMPERATURES, done), Round):
            temperatures = tuple(TEMPERATURES.value(i) for i in step.indices)
            found = self._score(step, [] if prior is None else [prior.prior], temperatures, keep=True, by_prior=False)
            done.append(found.scored)
            scored += [] if step.coarse else [found]
        return (best_temperature(done) if step.where == "inside" else None), _ranked(scored)

    def _score(
        self, step: Round, priors: list[float], temperatures: tuple[float, ...], keep: bool, by_prior: bool = True
    ) -> _Found:
        """Score a round over priors, or temperatures, in one pass over the validation data, and add up the shards."""
        shards = some(self.shards) if step.coarse else self.shards
        values = Values(len(self._rounds), tuple(priors), temperatures, keep and not step.coarse)
        keys = {shard.id: tuning_shard_key(self.key, values.shard(shard.id)) for shard in shards}
        left = [shard for shard in shards if not has(self.store, self.plan, keys[shard.id])]
        tasks = [ScoreShard(*self._common, shard, values, self.start) for shard in left]
        self.carry_out(tasks, f"shards of round {values.number + 1}", len(shards), len(shards) - len(tasks))
        totals, of_map, n = 0, 0, 0
        for key in keys.values():
            part, part_of_map, terms = read_shard(self.store, key, values)
            totals, of_map, n = totals + part, of_map + part_of_map, n + terms
        self._ids += [values.shard(shard.id) for shard in shards]
        return self._judge(step, values, by_prior, totals, of_map, n)

    def _judge(self, step: Round, values: Values, by_prior: bool, totals: Tensor, of_map: Tensor, n: int) -> _Found:
        """Make mean losses of a round's sums, and note them."""
        noises: dict[int, float] = {}
        if self._noise_is_open:
            shown, noise = profile_noise(totals, n)
            of_map, map_noise = profile_noise(of_map[None], n)
            losses, self._map_noise = shown, map_noise.item()
            noises = dict(zip(step.indices, noise.tolist(), strict=True))
        else:
            shown, of_map = totals / n, of_map[None] / n
            losses = lowest_over_temperatures(shown) if by_prior else shown[0]
            of_map = lowest_over_temperatures(of_map)
        limit = of_map.item()
        self._rounds.append(
            {
                **values.plain(),
                "losses": [_plain(loss) for loss in shown.flatten().tolist()],
                "noises": list(noises.values()),
                "map": _plain(limit),
                "terms": n,
                "coarse": step.coarse,
            }
        )
        scored = Scored(step, tuple(losses.tolist()), limit if by_prior and self._limit_is_map else math.nan)
        return _Found(scored, values, noises, self._map_noise)

    # -------------------------------------------------------------- against MAP

    def _first_no_worse(self, candidates: Sequence[Candidate]) -> tuple[int | None, dict[str, Any]]:
        shards = tuple(shard.id for shard in self.shards)
        task = FirstNoWorse(*self._common, tuple(candidates), shards)
        (receipt,) = self.carry_out([task], "comparisons", 1, 0)
        return receipt["number"], receipt["compared"]

    def _toward_map(
        self, prior: Outcome | None, before: dict[str, Any]
    ) -> tuple[Outcome | None, str | None, dict[str, Any], list[str]]:
        """Look at ever larger prior precisions, at temperature 1, until the predictive is MAP's.

        Args:
            prior: What is kept if it never is.
            before: Differences from MAP of the best candidate so far, which is worse.

        Returns:
            The best prior precision on the way that is not shown to be worse, the limit if it is that, the differences from MAP
            of the best one, and words.
        """
        if not self._limit_is_map:
            return prior, None, before, [words.worse_than_map(before, None, link_approx(self.config))]
        lattice = replace(self._lattice, extends=True, tolerance=SURE)
        top = lattice.size - 1 - lattice.stride if self._top is None else self._top
        step: Round | Found = Round(lattice.beyond(top, up=True, fine=False), coarse=False)
        done, scored = [], []
        while isinstance(step, Round):
            scored.append(self._score(step, [lattice.value(i) for i in step.indices], (1.0,), keep=True))
            done.append(scored[-1].scored)
            step = _next(lattice, done, to_limit=True)
        candidates = _ranked(scored)
        first, compared = self._first_no_worse(candidates)
        if first is not None and abs(candidates[first].loss - done[-1].limit) > TOLERANCE:
            return _outcome_of(candidates[first]), None, compared, words.passed_over(compared, self.config.prior_range)
        kept = _outcome(lattice, step, {i: noise for found in scored for i, noise in found.noises.items()})
        return kept, "MAP", before, [words.worse_than_map(before, kept.prior)]

    def _limit(self, where: str) -> str | None:
        if where == "high":
            return "MAP" if self._limit_is_map else "edge"
        return {"low": "prior", "edge": "edge"}.get(where)

    # -------------------------------------------------------------- facts

    @property
    def _common(self) -> tuple[str, str, str, dict[str, Any]]:
        return self.plan.digest, self.version, self.key, self.chosen

    @property
    def _noise_is_open(self) -> bool:
        return likelihood_of(self.config.likelihood).has_noise

    @property
    def _limit_is_map(self) -> bool:
        """Whether a predictive under ever larger prior precisions becomes that of MAP; the Laplace bridge does not."""
        return link_approx(self.config) != "bridge" or not likelihood_of(self.config.likelihood).scales_logits

    @property
    def _lattice(self) -> Lattice:
        size, given = self.config.grid_size, self.config.prior_range
        if given is None:
            return Lattice(size=size)
        return Lattice(math.log10(given[0]), math.log10(given[1]), size, extends=False)


@dataclass(frozen=True)
class _Found:
    """A round that was scored: its losses, its values, and the noises that go with them."""

    scored: Scored
    values: Values
    noises: dict[int, float]
    map_noise: float | None


def some(shards: Sequence[Segment]) -> list[Segment]:
    """Return the shards that a coarse round looks at, evenly spread."""
    examples = shards[-1].stop
    wanted = min(examples, max(ENOUGH, examples // SHARE))
    count = math.ceil(len(shards) * wanted / examples)
    return [shards[k * len(shards) // count] for k in range(count)]


def _next(lattice: Lattice, done: Sequence[Scored], to_limit: bool = False) -> Round | Found:
    try:
        return next_step(lattice, done, to_limit)
    except ValueError as error:
        raise RunFailed(f"tuning: {error}") from error


def _outcome(lattice: Lattice, found: Found, noises: Mapping[int, float]) -> Outcome:
    value, noise = lattice.value(found.index), noises.get(found.index)
    return Outcome(value if noise is None else value / noise**2, noise, found.where)


def _outcome_of(candidate: Candidate) -> Outcome:
    value, noise = candidate.values.priors[candidate.row], candidate.noise and candidate.noise[0]
    return Outcome(value if noise is None else value / noise**2, noise, "inside")


def _ranked(rounds: Sequence[_Found]) -> list[Candidate]:
    """Return every value of rounds on the same data, the best ones first."""
    found = []
    for scored in rounds:
        for row, (index, loss) in enumerate(zip(scored.scored.round.indices, scored.scored.scores, strict=True)):
            noise = (scored.noises[index], scored.map_noise) if scored.noises else None
            found.append(Candidate(scored.values, row, loss, noise))
    return sorted((one for one in found if math.isfinite(one.loss)), key=lambda one: one.loss)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
