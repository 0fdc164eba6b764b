"""Rounds of scores on validation data: one pass each, whose shards are committed, and added up.

A round that was killed goes on with the shards that are left, and ends in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from laplace.scoring import lowest_over_temperatures, profile_noise
from laplace.search import Round, Scored
from laplace_dist.config.compatibility import link_approx
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import Config
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run.layout import tuning_shard_key
from laplace_dist.run.ownership import has
from laplace_dist.run.tunings import Values, read_shard
from laplace_dist.stages.tune import Candidate, FirstNoWorse, ScoreShard
from laplace_dist.storage.store import Store

ENOUGH, SHARE = 1000, 16  # examples that a coarse round looks at: at least so many, and one in so many


@dataclass(frozen=True)
class ScoredRound:
    """A round that was scored: its losses, its values, and the noises that go with them."""

    scored: Scored
    values: Values
    noises: dict[int, float]
    map_noise: float | None


@dataclass
class Rounds:
    """The rounds of one tuning, and the comparisons of their values with MAP.

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
        done: What is written down of every round.
        ids: Of the shards that were scored.
        map_noise: The best noise of MAP in the last round, where the noise is open.
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
    done: list[dict[str, Any]] = field(default_factory=list, init=False)
    ids: list[str] = field(default_factory=list, init=False)
    map_noise: float | None = field(default=None, init=False)

    def score(
        self, step: Round, priors: list[float], temperatures: tuple[float, ...], keep: bool, by_prior: bool = True
    ) -> ScoredRound:
        """Score a round over priors, or temperatures, in one pass over the validation data, and add up the shards.

        Args:
            step: The round: indices of its values, and whether it is coarse.
            priors: Prior precisions; none for that of `start`.
            temperatures: Of the logits.
            keep: Whether what the comparison with MAP needs is kept of a round that is not coarse.
            by_prior: Whether the values of the round are priors, each under the best temperature; else they are temperatures.
        """
        shards = some(self.shards) if step.coarse else self.shards
        values = Values(len(self.done), tuple(priors), temperatures, keep and not step.coarse)
        keys = {shard.id: tuning_shard_key(self.key, values.shard(shard.id)) for shard in shards}
        left = [shard for shard in shards if not has(self.store, self.plan, keys[shard.id])]
        tasks = [ScoreShard(*self.common, shard, values, self.start) for shard in left]
        self.carry_out(tasks, f"shards of round {values.number + 1}", len(shards), len(shards) - len(tasks))
        totals, of_map, n, fixed = 0, 0, 0, by_prior
        for key in keys.values():
            part, part_of_map, terms, part_fixed = read_shard(self.store, key, values)
            totals, of_map, n, fixed = totals + part, of_map + part_of_map, n + terms, fixed and part_fixed
        self.ids += [values.shard(shard.id) for shard in shards]
        found = self._judge(step, values, by_prior, totals, of_map, n)
        return replace(found, scored=replace(found.scored, fixed=fixed))

    def _judge(
        self, step: Round, values: Values, by_prior: bool, totals: Tensor, of_map: Tensor, n: int
    ) -> ScoredRound:
        """Make mean losses of a round's sums, and note them."""
        noises: dict[int, float] = {}
        if self._noise_is_open:
            shown, noise = profile_noise(totals, n)
            of_map, map_noise = profile_noise(of_map[None], n)
            losses, self.map_noise = shown, map_noise.item()
            noises = dict(zip(step.indices, noise.tolist(), strict=True))
        else:
            shown, of_map = totals / n, of_map[None] / n
            losses = lowest_over_temperatures(shown) if by_prior else shown[0]
            of_map = lowest_over_temperatures(of_map)
        limit = of_map.item()
        self.done.append(
            {
                **values.plain(),
                "losses": [_plain(loss) for loss in shown.flatten().tolist()],
                "noises": list(noises.values()),
                "map": _plain(limit),
                "terms": n,
                "coarse": step.coarse,
            }
        )
        scored = Scored(step, tuple(losses.tolist()), limit if by_prior and self.limit_is_map else math.nan)
        return ScoredRound(scored, values, noises, self.map_noise)

    def first_no_worse(self, candidates: Sequence[Candidate]) -> tuple[int | None, dict[str, Any]]:
        """Return the number of the first candidate that is not shown to be worse than MAP, if any, and its differences."""
        shards = tuple(shard.id for shard in self.shards)
        task = FirstNoWorse(*self.common, tuple(candidates), shards)
        (receipt,) = self.carry_out([task], "comparisons", 1, 0)
        return receipt["number"], receipt["compared"]

    @property
    def common(self) -> tuple[str, str, str, dict[str, Any]]:
        """What all tasks of the tuning begin with."""
        return self.plan.digest, self.version, self.key, self.chosen

    @property
    def _noise_is_open(self) -> bool:
        return likelihood_of(self.config.likelihood).has_noise

    @property
    def all_are_map(self) -> bool:
        """Whether every loss of every round is that of MAP, but for rounding."""
        pairs = [(loss, found["map"]) for found in self.done for loss in found["losses"]]
        return all(None not in pair and math.isclose(*pair, abs_tol=1e-9) for pair in pairs)

    @property
    def limit_is_map(self) -> bool:
        """Whether a predictive under ever larger prior precisions becomes that of MAP; the Laplace bridge does not."""
        return link_approx(self.config) != "bridge" or not likelihood_of(self.config.likelihood).scales_logits


def some(shards: Sequence[Segment]) -> list[Segment]:
    """Return the shards that a coarse round looks at, evenly spread."""
    examples = shards[-1].stop
    wanted = min(examples, max(ENOUGH, examples // SHARE))
    count = math.ceil(len(shards) * wanted / examples)
    return [shards[k * len(shards) // count] for k in range(count)]


def ranked(rounds: Sequence[ScoredRound]) -> list[Candidate]:
    """Return every value of rounds on the same data, the best ones first."""
    found = []
    for scored in rounds:
        for row, (index, loss) in enumerate(zip(scored.scored.round.indices, scored.scored.scores, strict=True)):
            noise = (scored.noises[index], scored.map_noise) if scored.noises else None
            found.append(Candidate(scored.values, row, loss, noise))
    return sorted((one for one in found if math.isfinite(one.loss)), key=lambda one: one.loss)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
