"""Where to look next for the best value of one positive quantity: coarse to fine on a lattice of its logarithm.

A search is a function of what was scored so far, so that it can be interrupted at any point and ends in the same place. It
begins coarse, goes on outside where the best value lies at an end, and then looks at every point of the lattice around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4  # nats per term: losses that differ by less are taken for the same


@dataclass(frozen=True)
class Lattice:
    """The points ``base ** (low + i * step)``, those from ``low`` to ``high`` at first.

    Attributes:
        low: Lower end, as an exponent.
        high: Upper end, as an exponent.
        size: Number of points from the one to the other; the step follows.
        base: Of the exponents.
        extends: Whether a search may go on outside.
        floor: Exponent below which it does not.
        ceiling: Exponent above which it does not.
        reach: Exponents by which it goes on at once.
        tolerance: Losses that differ by no more are taken for the same.
    """

    low: float = -4.0
    high: float = 4.0
    size: int = 41
    base: float = 10.0
    extends: bool = True
    floor: float = -16.0
    ceiling: float = 16.0
    reach: float = 4.0
    tolerance: float = TOLERANCE

    def __post_init__(self):
        """Refuse a lattice without an inside.

        Raises:
            ValueError: If it is empty or inverted.
        """
        if self.size < 2 or not self.low < self.high:
            raise ValueError(
                f"A search from {self.low} to {self.high} in {self.size} values is empty; give size >= 2 and min < max."
            )

    @property
    def step(self) -> float:
        """Exponents between neighbours."""
        return (self.high - self.low) / (self.size - 1)

    @property
    def stride(self) -> int:
        """Steps between the points of a coarse round; the number of points in all is then the smallest."""
        return max(1, round(math.sqrt((self.size - 1) / 2)))

    def value(self, index: int) -> float:
        """The point of this number; numbers below zero and from ``size`` on lie outside."""
        return self.base ** (self.low + index * self.step)

    def coarse(self) -> tuple[int, ...]:
        """Every so manieth point, and both ends."""
        return tuple(sorted({*range(0, self.size, self.stride), self.size - 1}))

    def around(self, index: int) -> tuple[int, ...]:
        """The points about as far from one as a coarse round's neighbours are."""
        return tuple(i for i in range(index - self.stride, index + self.stride + 1) if self.holds(i))

    def beyond(self, index: int, up: bool, fine: bool) -> tuple[int, ...]:
        """Further points on one side: all of those as far as a coarse neighbour, or coarse ones as far as ``reach``."""
        count = self.stride if fine else max(1, math.ceil(self.reach / self.step / self.stride))
        step = (1 if fine else self.stride) * (1 if up else -1)
        found = [index + k * step for k in range(1, count + 1)]
        return tuple(sorted(i for i in found if self.holds(i)))

    def holds(self, index: int) -> bool:
        """Whether a search may look at this point."""
        if not self.extends:
            return 0 <= index < self.size
        return self.floor <= self.low + index * self.step <= self.ceiling


@dataclass(frozen=True)
class Round:
    """Points to score next.

    Attributes:
        indices: Their numbers on the lattice, ascending.
        coarse: They only tell where to look, so that a part of the data suffices.
    """

    indices: tuple[int, ...]
    coarse: bool


@dataclass(frozen=True)
class Scored:
    """A round and what it gave.

    Attributes:
        round: The points.
        scores: Mean loss of each.
        limit: Mean loss in the limit above all points, NaN where there is no such limit that is known.
        fixed: No point changes the loss of anything that was looked at, those that were not scored neither.
    """

    round: Round
    scores: tuple[float, ...]
    limit: float = math.nan
    fixed: bool = False


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        index: The best point.
            Of those below which the loss no longer changes, the highest.
        where: ``'inside'``; ``'high'`` or ``'low'`` if the loss no longer changes on that side (above: differs from its limit
            by no more than the tolerance); ``'edge'`` if it does, and the search may not go on there; ``'flat'`` if the loss is
            the same at every point there can be.
    """

    index: int
    where: str


def next_step(lattice: Lattice, done: Sequence[Scored], to_limit: bool = False) -> Round | Found:
    """The next round of a search, or its end.

    Args:
        lattice: The points.
        done: The rounds so far, in order.
        to_limit: Look for the lowest point whose loss is that of the limit above, whatever is best.

    Raises:
        ValueError: If no point has a finite loss.
    """
    if not done:
        return Round(lattice.coarse(), coarse=lattice.stride > 1)
    if done[0].fixed and done[0].round.coarse:  # a part of the data that tells nothing
        done = done[1:]
        if not done:
            return Round(tuple(range(lattice.size)), coarse=False)
    if done[0].fixed:
        return Found(lowest(scores_of(done[:1])), "flat")
    fine = [scored for scored in done if not scored.round.coarse]
    if not fine:
        found = _look(lattice, done, to_limit)
        if isinstance(found, Round):
            return found
        return Round(lattice.around(found.index), coarse=False)
    coarse = [scored for scored in done if scored.round.coarse]
    found = _look(lattice, fine, to_limit, located=bool(coarse))
    if isinstance(found, Round) or found.where != "inside" or not coarse:
        return found
    where = _look(lattice, coarse, to_limit).where
    flat = {"low": lambda i: i <= found.index, "high": lambda i: i >= found.index}.get(where)
    scores = scores_of(fine)
    if flat and _flat(lattice, {i: score for i, score in scores.items() if flat(i)}, scores[found.index]):
        return Found(found.index, where)
    return found


def scores_of(done: Sequence[Scored]) -> dict[int, float]:
    """The losses of several rounds on the same data by point, ascending."""
    found: dict[int, float] = {}
    for scored in done:
        found |= dict(zip(scored.round.indices, scored.scores, strict=True))
    return dict(sorted(found.items()))


def _look(lattice: Lattice, done: Sequence[Scored], to_limit: bool, located: bool = False) -> Round | Found:
    """Judge rounds of one kind: is the best point inside, or where do they go on?

    A loss that does not change may be all that is seen of one that changes elsewhere. So unless coarse rounds have ``located``
    the best point, a limit counts only where something on its other side is worse.
    """
    scores, limit, coarse = scores_of(done), done[-1].limit, done[-1].round.coarse
    low, high = min(scores), max(scores)
    best = lowest(scores)
    if to_limit or limit < scores[best] - lattice.tolerance:
        if _at_limit(lattice, scores, high, limit):
            return Found(min(i for i in scores if _at_limit(lattice, scores, i, limit)), "high")
        further = lattice.beyond(high, True, fine=not (coarse or to_limit))
        return Round(further, coarse) if further else Found(high, "edge")
    where = _plateau(lattice, scores, best, limit)
    if where in ("low", "high") and not located:
        other = [score for i, score in scores.items() if (i > best if where == "low" else i < best)]
        further = lattice.beyond(high if where == "low" else low, where == "low", fine=not coarse)
        if further and not any(score > scores[best] + lattice.tolerance or math.isnan(score) for score in other):
            return Round(further, coarse)
    if where == "low":
        same = [i for i in scores if all(abs(scores[j] - scores[best]) <= lattice.tolerance for j in scores if j <= i)]
        return Found(max(same), where)
    if where == "high" or best not in (low, high):
        return Found(best, where)
    further = lattice.beyond(best, best == high, fine=not coarse)
    return Round(further, coarse) if further else Found(best, "edge")


def lowest(scores: Mapping[int, float]) -> int:
    """The point of the lowest finite loss; of equal ones, the middle one.

    Raises:
        ValueError: If no loss is finite.
    """
    finite = {index: score for index, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise ValueError("No value that was tried has a finite score; look at the predictions and the targets.")
    ties = [index for index, score in sorted(finite.items()) if score == min(finite.values())]
    return ties[len(ties) // 2]


def _at_limit(lattice: Lattice, scores: Mapping[int, float], index: int, limit: float) -> bool:
    """Whether from here on upwards the loss is that of the limit."""
    return all(abs(score - limit) <= lattice.tolerance for i, score in scores.items() if i >= index)


def _plateau(lattice: Lattice, scores: Mapping[int, float], best: int, limit: float) -> str:
    """Which limit the best point has reached: ``'high'``, ``'low'``, or none, ``'inside'``."""
    if not math.isnan(limit) and _at_limit(lattice, scores, best, limit):
        return "high"
    apart = min(max(lattice.stride, math.ceil(0.5 / lattice.step)), max(2 * lattice.stride, 1))
    below = {i: score for i, score in scores.items() if i <= max(best, min(scores) + apart)}
    if min(scores) + apart in scores and _flat(lattice, below, scores[best]):
        return "low"
    above = {i: score for i, score in scores.items() if i >= min(best, max(scores) - apart)}
    if math.isnan(limit) and max(scores) - apart in scores and _flat(lattice, above, scores[best]):
        return "high"
    return "inside"


def _flat(lattice: Lattice, scores: Mapping[int, float], value: float) -> bool:
    return all(abs(score - value) <= lattice.tolerance for score in scores.values())


def vertex(values: Sequence[float], scores: Sequence[float]) -> tuple[float, float]:
    """The lowest point of the parabola through the lowest of some scores and its two neighbours.

    Args:
        values: Where the scores were taken, ascending and evenly spaced.
        scores: The scores. The lowest one is taken itself where it has no two neighbours, or these are not finite; infinity
            where none is.

    Returns:
        The point, and the parabola's value there.
    """
    if not any(map(math.isfinite, scores)):
        return values[0], math.inf
    best = lowest(dict(enumerate(scores)))
    if not 0 < best < len(scores) - 1:
        return values[best], scores[best]
    left, middle, right = scores[best - 1 : best + 2]
    curvature = left - 2 * middle + right
    if not (math.isfinite(curvature) and curvature > 0):
        return values[best], middle
    shift = (left - right) / (2 * curvature)
    return values[best] + shift * (values[best + 1] - values[best]), middle - curvature * shift**2 / 2
