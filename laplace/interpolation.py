r"""Predictive variances of many scalar prior precisions from those of a few.

As a function of the prior precision, a variance is :math:`\sum_i r_i^2 / (h_i + \delta)` with curvatures
:math:`0 \le h_i \le H`. A rational function in :math:`\delta` with poles :math:`-p_1, \dots, -p_m` in :math:`[-H, 0]`
that has the values of :math:`1 / (h + \delta)` at nodes :math:`\delta_1, \dots, \delta_m` is off by the share

.. math:: \frac{R(\delta)}{R(-h)}, \qquad R(z) = \prod_j \frac{z - \delta_j}{z + p_j} ,

whatever :math:`h` is, and is a sum of these values with coefficients that do not depend on it. So one set of coefficients gives
all variances, and covariances too. Zolotarev's nodes and poles make the largest share the smallest (Beckermann and Townsend,
"On the singular values of matrices with displacement structure", SIAM J. Matrix Anal. Appl. 2017): for prior precisions from
:math:`a` to :math:`b` at most :math:`4 \exp(-m \pi^2 / \log 16 \gamma)` with
:math:`\gamma = \frac{(H + a)\, b}{(H + b)\, a}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ERROR = 2e-5  # share of a variance by which an interpolated one may be off


class Interpolation:
    """Nodes, and coefficients from them.

    Attributes:
        nodes: Prior precisions at which variances have to be known, ascending.
    """

    def __init__(self, low: float, high: float, largest: float, count: int) -> None:
        """Find nodes and poles.

        Args:
            low: Least of the prior precisions.
            high: Largest of them.
            largest: A bound on the curvature; infinity if there is none.
            count: Number of nodes.
        """
        gamma = _cross_ratio(low, high, largest)
        alpha = 2 * gamma - 1 + 2 * math.sqrt(gamma * (gamma - 1))
        places = alpha * _dn((2 * np.arange(count, 0, -1) - 1) / (2 * count), 1 / alpha)
        slope = ((alpha + 1) / high - 2 / low) / (alpha - 1)  # of what maps -1, 1 and alpha to 0, low and high
        shift = 2 / low - slope
        self.nodes = (places + 1) / (slope * places + shift)
        self._poles = (places - 1) / (shift - slope * places)

    def at(self, variances: Tensor, values: Sequence[float]) -> Tensor:
        """Variances, or covariances, of ``values`` from those of the nodes, ``(nodes, …)``."""
        return torch.tensordot(torch.from_numpy(self.coefficients(values)).to(variances), variances, 1)

    def coefficients(self, values: Sequence[float]) -> np.ndarray:
        """Those of every value, ``(values, nodes)``."""
        at, nodes, poles = np.asarray(values, dtype=np.float64)[:, None], self.nodes, self._poles
        apart = nodes[:, None] - nodes
        np.fill_diagonal(apart, 1.0)
        scale = np.prod((nodes[:, None] + poles) / apart, 1)
        distance = at - nodes
        same = np.abs(distance) <= 1e-13 * nodes
        whole = np.prod(distance / (at + poles), 1, keepdims=True)
        found = whole * scale / np.where(same, 1.0, distance)
        return np.where(same.any(1, keepdims=True), same, found)


def interpolation_for(values: Sequence[float], largest: float = math.inf) -> Interpolation | None:
    """How to know the variances of all values from those of fewer; None if that saves nothing.

    Args:
        values: Positive prior precisions.
        largest: A bound on the curvature that they are added to; infinity if there is none.
    """
    return interpolations(values, [largest])[0]


def interpolations(values: Sequence[float], largest: Sequence[float]) -> list[Interpolation | None]:
    """As :func:`interpolation_for`, for several bounds on curvatures; those that ask for as many nodes share theirs."""
    if len(values) < 2 or not min(values) > 0 or not max(values) > min(values):
        return [None] * len(largest)
    low, high, several = min(values), max(values), len(set(values))
    bounds = [max(bound, low) for bound in largest]
    counts = [_count(low, high, bound) for bound in bounds]
    widest = {count: max(b for b, c in zip(bounds, counts, strict=True) if c == count) for count in set(counts)}
    made = {count: Interpolation(low, high, b, count) for count, b in widest.items() if count < several}
    return [made.get(count) for count in counts]


def _count(low: float, high: float, largest: float) -> int:
    """Nodes that keep the error."""
    rate = math.pi**2 / math.log(16 * _cross_ratio(low, high, largest))
    return max(2, math.ceil(math.log(4 / ERROR) / rate))


def _cross_ratio(low: float, high: float, largest: float) -> float:
    return high / low * (1.0 if math.isinf(largest) else (largest + low) / (largest + high))


def _dn(share: np.ndarray, complement: float) -> np.ndarray:
    r"""Jacobi's :math:`\mathrm{dn}` at shares of the quarter period, for a complementary modulus in (0, 1)."""
    modulus = math.sqrt((1 - complement) * (1 + complement))
    ratio = _mean(1.0, modulus) / _mean(1.0, complement)  # of the quarter periods K / K'
    terms = np.arange(-_terms(ratio), _terms(ratio) + 1)
    quarter = math.pi / 2 / _mean(1.0, modulus)  # K'
    with np.errstate(over="ignore"):  # whose reciprocal is nothing
        return math.pi / (2 * quarter) * (1 / np.cosh(math.pi / 2 * ratio * (share[:, None] - 2 * terms))).sum(1)


def _terms(ratio: float) -> int:
    return 1 + math.ceil(13 / ratio)


def _mean(a: float, b: float) -> float:
    """The arithmetic-geometric mean."""
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a
