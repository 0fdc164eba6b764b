"""Recalibrate: is a candidate worse than the current posterior on the same fresh examples?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, log
from typing import Any

from laplace.likelihoods.comparison import paired_differences
from laplace_dist.config.settings import Config
from laplace_dist.run import tunings
from laplace_dist.run.checkpoint import open_json
from laplace_dist.run.evaluations import joined_scores
from laplace_dist.run.provenance import environment
from laplace_dist.stages.context import Context
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class Compare:
    """Compare the scores of two committed evaluations of the same split, by paired bootstrap.

    Attributes:
        plan: Digest of the plan.
        candidate: Key of the candidate's evaluation.
        current: Key of the current posterior's.
        shards: Ids of the test split's shards in order.
        draws: Of the bootstrap.
        level: One-sided level of each end of the interval.
        seed: Of the draws.
    """

    plan: str
    candidate: str
    current: str
    shards: tuple[str, ...]
    draws: int
    level: float
    seed: int
    what = "comparison of candidate and current"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has the differences by name, and where they were made."""
        one, other = (
            joined_scores(context.store, key, "test", list(self.shards), "laplace")
            for key in (self.candidate, self.current)
        )
        found = paired_differences(one, other, draws=self.draws, level=self.level, seed=self.seed)
        made = environment(context.device)
        return {"differences": {name: asdict(difference) for name, difference in found.items()}, "environment": made}


def settings(config: Config, data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a decision depends on beside the windows and what is current.

    Args:
        config: The job's settings.
        data: Fingerprints of the splits on which is tuned and compared, by name.
    """
    names = (
        "draws",
        "level",
        "margin_nll",
        "margin_ece",
        "gate",
        "unlabelled",
        "seed",
        "link_approx",
        "pred_type",
        "skip_tune",
    )
    chosen = {name: getattr(config, name) for name in names}
    if not config.skip_tune:
        chosen |= {"recalibrate": config.recalibrate, "tune_method": config.tuning}
        chosen |= {name: getattr(config, name) for name in ("prior_structure", "prior_range", "grid_size")}
    return {**chosen, "data": {name: found["sha256"] for name, found in data.items()}}


def still_holds(
    found: Mapping[str, Any], terms: Sequence[Any], asked: Callable[[], Mapping[str, Any]], current: Mapping[str, Any]
) -> bool:
    """Say whether a decision is the answer to what is asked now, and the current posterior still what it left.

    Args:
        found: The decision.
        terms: The windows of the candidate, with their weights.
        asked: Returns `settings(...)`, for which data are read.
        current: `CURRENT.json`.
    """
    side = found["candidate" if found["promoted"] else "current"]
    left = (current["version"], current["tuning"]) == (side["version"], side["tuning"])
    same = left and not found.get("pending") and found["windows"] == weights_of(terms)
    return same and found["settings"] == asked()


def needed(level: float) -> int:
    r"""Return how many fresh examples a promotion needs at least: $\min\{n : \ell^n \le 1 - \ell\}$ at the level $\ell$.

    Of fewer, all may miss the share $1 - \ell$ of examples on which a candidate is worst with more than that probability, and a
    bootstrap knows of nothing that it has not seen (Wilks, Annals of Mathematical Statistics 12, 1941): 59 at 0.95.
    """
    return ceil(log(1 - level) / log(level) - 1e-9)


def decide(
    differences: Mapping[str, Mapping[str, float]], margins: Mapping[str, float], examples: int, level: float
) -> tuple[bool, str]:
    """Say whether a candidate is promoted, and which figure decides.

    It is if it is shown to be no worse: of every figure the upper end of the interval of candidate minus current is at most the
    margin. A candidate of which that cannot be said stays a candidate, whether it is worse or the examples are too few.

    Args:
        differences: `value`, `low` and `high` by figure.
        margins: How much worse is not worse, by figure.
        examples: How many fresh ones there are.
        level: One-sided level of each end of an interval.
    """
    if examples < (least := needed(level)):
        return (
            False,
            f"{examples} fresh examples are too few to tell: a promotion at --level {level:g} needs at least {least}",
        )
    over = {name: found for name, found in differences.items() if not found["high"] <= margins[name]}
    name = min(over or differences, key=lambda name: margins[name] - differences[name]["high"])
    found = differences[name]
    change = f"{name.upper()} of the candidate minus that of the current one: {found['value']:+z.4f}, interval "
    text = f"{change}{found['low']:+z.4f} to {found['high']:+z.4f}, margin {margins[name]:.4g}"
    return not over, text if not over else f"{text}: it is not shown to be no worse"


def metrics_of(store: Store, sides: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of `map`, `current` and `candidate`, from the evaluations of the two sides."""
    found = {name: open_json(store.read(s["evaluation"]), s["evaluation"])["metrics"] for name, s in sides.items()}
    own = {name: metrics["laplace"] for name, metrics in found.items()}
    return {"map": found["candidate"]["map"], "current": own["current"], "candidate": own["candidate"]}


def notes_of(store: Store, found: Mapping[str, Any], has_noise: bool) -> tuple[str, ...]:
    """Return which noises and temperatures the figures of a decision are of, as far as the tunings are there.

    Args:
        store: The checkpoint.
        found: The decision.
        has_noise: Whether its likelihood has a noise, which is 1 where nothing was tuned.
    """
    lines = []
    for side, who in (("candidate", "the candidate"), ("current", "the current one")):
        key, manifest = found[side]["tuning"], {"sigma_noise": 1.0 if has_noise else None}
        if key is None or store.exists(key):
            manifest = manifest if key is None else tunings.read_tuning(store, key)[0]
            lines += tunings.beside(manifest, who, with_map=side == "candidate")
    return tuple(lines)


def weights_of(terms: Sequence[Any]) -> list[dict[str, Any]]:
    """Return which windows a posterior version is made of, as plain values."""
    return [{"window": term.window.name, "weight": term.weight, "sum": term.digest} for term in terms]
