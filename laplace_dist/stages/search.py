"""The driver's side of a tuning on validation data: rounds of scores, one pass each, until the best value is found.

What a round looks at follows from the scores of the rounds before it, which are committed: a search that was killed goes on,
and ends in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from laplace.search import TOLERANCE, Found, Lattice, Round, Scored, next_step
from laplace.temperature import TEMPERATURES, best_temperature
from laplace_dist.config.compatibility import link_approx
from laplace_dist.errors import RunFailed
from laplace_dist.run.tunings import read_tuning
from laplace_dist.stages import words
from laplace_dist.stages.rounds import Rounds, ranked, some
from laplace_dist.stages.tune import Candidate, CommitChoice

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


class Search:
    """One tuning on validation data: which rounds are scored, and what is chosen of them.

    Args:
        rounds: None of which is scored yet.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.config = rounds, rounds.config
        self._top: int | None = None

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
        first, compared = self.rounds.first_no_worse(candidates) if candidates else (0, {})
        if first is None:
            prior, limit, compared, text = self._toward_map(prior, compared)
            temperature, said, helps = 1.0, [*said, *text], limit is None and self.rounds.limit_is_map
        else:
            if first > 0 and scaled:
                temperature = candidates[first].values.temperatures[candidates[first].row]
            elif first > 0:
                prior, limit = _outcome_of(candidates[first]), None
            said += words.passed_over(compared) if first > 0 else []
            helps = limit != "MAP" or temperature != 1
            ending = words.ending(limit, prior and prior.prior, helps, self.config.prior_range)
            flat = limit == "MAP" and (prior.where == "flat" or self.rounds.all_are_map)
            said += [words.NO_DEPENDENCE] if flat else ending
        if not helps:
            said.append(words.advice(self.rounds.plan.settings, self.config))
        return self._choice(prior, temperature, limit=limit, helps=helps, compared=compared, said=said)

    def compare(self) -> CommitChoice:
        """Compare the prior of `start`, which the evidence has chosen, with MAP; search where that is shown to be better."""
        found = self.rounds.score(Round((0,), coarse=False), [], (1.0,), keep=True, by_prior=False)
        (candidate,) = ranked([found]) or [None]
        if candidate is not None and candidate.noise is not None:
            noise = read_tuning(self.rounds.store, self.rounds.start)[0]["sigma_noise"]
            candidate = replace(candidate, noise=(noise, candidate.noise[1]))
        first, compared = (None, {}) if candidate is None else self.rounds.first_no_worse([candidate])
        if first is None:
            task = self.choose()
            search = {**task.search, "said": [words.evidence_is_worse(compared), *task.search["said"]]}
            return replace(task, search=search)
        return self._choice(None, 1.0, limit=None, helps=True, compared=compared, said=[])

    def _choice(self, prior: Outcome | None, temperature: float, **found: Any) -> CommitChoice:
        """Return the task that commits a choice, and how it was found; without a prior that of `start` is kept."""
        rounds, values = self.rounds, (None, None) if prior is None else (prior.prior, prior.noise)
        search = {"rounds": rounds.done, **found, "map_noise": rounds.map_noise}
        return CommitChoice(*rounds.common, *values, temperature, rounds.start, tuple(rounds.ids), search)

    # -------------------------------------------------------------- the searches

    def _search_prior(self, temperatures: tuple[float, ...]) -> tuple[Outcome, list[Candidate]]:
        """Search the prior precision, each under the best of some temperatures."""
        lattice, done, scored, alone = self._lattice, [], [], len(temperatures) == 1
        whole = Round(tuple(range(lattice.size)), coarse=False) if self._one_pass_is_enough else None
        while isinstance(step := (not done and whole) or _next(lattice, done), Round):
            found = self.rounds.score(step, [lattice.value(i) for i in step.indices], temperatures, keep=alone)
            done.append(found.scored)
            scored += [] if step.coarse else [found]
        noises = {i: noise for found in scored for i, noise in found.noises.items()}
        self._top = max(i for found in scored for i in found.scored.round.indices)
        return _outcome(lattice, step, noises), ranked(scored) if alone else []

    def _search_temperature(self, prior: Outcome | None) -> tuple[float | None, list[Candidate]]:
        """Search the temperature, at the prior that was found, or that of the tuning before; None if none is best."""
        done, scored = [], []
        while isinstance(step := _next(TEMPERATURES, done), Round):
            temperatures = tuple(TEMPERATURES.value(i) for i in step.indices)
            found = self.rounds.score(
                step, [] if prior is None else [prior.prior], temperatures, keep=True, by_prior=False
            )
            done.append(found.scored)
            scored += [] if step.coarse else [found]
        return (best_temperature(done) if step.where == "inside" else None), ranked(scored)

    # -------------------------------------------------------------- against MAP

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
        if not self.rounds.limit_is_map:
            return prior, None, before, [words.worse_than_map(before, None, link_approx(self.config))]
        lattice = replace(self._lattice, extends=True, tolerance=SURE)
        top = lattice.size - 1 - lattice.stride if self._top is None else self._top
        step: Round | Found = Round(lattice.beyond(top, up=True, fine=False), coarse=False)
        done, scored = [], []
        while isinstance(step, Round):
            scored.append(self.rounds.score(step, [lattice.value(i) for i in step.indices], (1.0,), keep=True))
            done.append(scored[-1].scored)
            step = _next(lattice, done, to_limit=True)
        candidates = ranked(scored)
        first, compared = self.rounds.first_no_worse(candidates)
        if first is not None and abs(candidates[first].loss - done[-1].limit) > TOLERANCE:
            return _outcome_of(candidates[first]), None, compared, words.passed_over(compared, self.config.prior_range)
        kept = _outcome(lattice, step, {i: noise for found in scored for i, noise in found.noises.items()})
        return kept, "MAP", before, [words.worse_than_map(before, kept.prior)]

    def _limit(self, where: str) -> str | None:
        if where in ("high", "flat"):
            return "MAP" if self.rounds.limit_is_map else "edge"
        return {"low": "prior", "edge": "edge"}.get(where)

    # -------------------------------------------------------------- facts

    @property
    def _one_pass_is_enough(self) -> bool:
        """Whether all values are scored at once: a coarse round would look at all the data, and a value more costs little.

        Of linearised predictives with a closed link many priors cost hardly more than one; what is sampled does.
        """
        closed = self.config.tuned_pred_type == "glm" and link_approx(self.config) != "mc"
        return closed and len(some(self.rounds.shards)) == len(self.rounds.shards)

    @property
    def _lattice(self) -> Lattice:
        size, given = self.config.grid_size, self.config.prior_range
        if given is None:
            return Lattice(size=size)
        return Lattice(math.log10(given[0]), math.log10(given[1]), size, extends=False)


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
