r"""Do two samples have more values in common than chance explains, given how often values repeat?

If both samples, of sizes $n$ and $m$, are draws from one distribution, who has got which value is a matter of chance: given
all of them, a value that occurs $t$ times is in both samples with probability $1 - f^t - (1 - f)^t$, where $f = n / (n + m)$.
The number of values that are in both is then a sum of indicators that hardly depend on each other, and Hoeffding's bound for
such sums is taken (Journal of the American Statistical Association 58, 1963). Values that repeat by nature, such as blank
examples, repeat within the samples as well, so that they are expected in both; a copy of examples is in both and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Common:
    """What two samples have in common.

    Attributes:
        values: Number of different values that are in both.
        repeated: Number of different values that occur more than once in all.
        expected: How many of these would be in both, if it were chance who has got which value.
        p_value: Bound on the probability of so many or more by chance.
    """

    values: int
    repeated: int
    expected: float
    p_value: float

    @property
    def explained(self) -> float:
        """How many values chance puts into both beside those that it leaves in one, as far as these tell."""
        left = self.repeated - self.expected
        return 0.0 if left <= 0 else min(float(self.values), (self.repeated - self.values) * self.expected / left)

    @property
    def excess(self) -> float:
        """How many more values are in both than chance explains."""
        return self.values - self.explained


def common(one: np.ndarray, other: np.ndarray, sizes: tuple[int, int]) -> Common:
    """Count what two samples have in common.

    Args:
        one: How often each value of their union occurs in the first sample, ``(values,)``, integers.
        other: The same for the second one.
        sizes: Of the samples, which may hold further values that occur once in all and are left out here.
    """
    times, both = one + other, int(((one > 0) & (other > 0)).sum())
    times = times[times > 1].astype(np.float64)
    if not len(times):
        return Common(0, 0, 0.0, 1.0)
    share = sizes[0] / (sizes[0] + sizes[1])
    expected = float((1 - share**times - (1 - share) ** times).sum())
    return Common(both, len(times), expected, _hoeffding(both, expected, len(times)))


def _hoeffding(found: int, expected: float, n: int) -> float:
    """Bound the probability that a sum of `n` indicators of this mean is at least `found`."""
    p, q = found / n, expected / n
    if p <= q:
        return 1.0
    divergence = p * np.log(p / q) + ((1 - p) * np.log((1 - p) / (1 - q)) if p < 1 else 0.0)
    return float(np.exp(-n * divergence))
