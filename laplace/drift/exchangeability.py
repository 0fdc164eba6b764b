r"""Has a stream of scores changed? A test that may be repeated at every look, with one false-alarm rate over all of them.

Scores (one number per example, such as the entropy of its prediction) are compared by rank with those of a reference and of all
earlier looks. As long as all examples are exchangeable, the smoothed conformal p-values

.. math:: p_i = \frac{\#\{j < i : s_j > s_i\} + u_i\,(1 + \#\{j < i : s_j = s_i\})}{i}

are independent and uniform (Vovk, Nouretdinov and Gammerman, "Testing exchangeability on-line", ICML 2003). A look bets against
that with a histogram of its :math:`p_i` that learns as it goes, a mixture of Dirichlet priors over bins (a plug-in martingale;
Fedorova, Gammerman, Nouretdinov and Vovk, ICML 2012), whose capital :math:`B_t` at the end of look :math:`t` has mean 1. Since
nobody knows when a change begins, the capital is spread over all starts with weights :math:`w_s = 1/(s(s+1))`:

.. math:: E_t = \sum_{s \le t} w_s \prod_{r=s}^{t} B_r + \sum_{s > t} w_s

is a non-negative martingale that starts at 1, so that by Ville's inequality :math:`P(\sup_t E_t \ge 1/\alpha) \le \alpha`:
over all looks together, however many there are and whenever one stops (Ramdas, Grünwald, Vovk and Shafer, "Game-theoretic
statistics and safe anytime-valid inference", Statistical Science 2023; Shin, Ramdas and Rinaldo, "E-detectors", 2023).

Scores are kept as counts between the quantiles of one half of the reference; the other half is what is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 20  # of scores
_RANKS = 10  # bins of the p-values
_LOOK = 100_000  # examples of one look, at most: more are no clearer, and take memory
_PRIORS = (1.0, 10.0, 100.0, 1000.0)  # pseudo-examples per bin: from quick to learn to hard to convince


@dataclass(frozen=True)
class Stream:
    """What is kept of a stream of scores.

    Attributes:
        edges: Upper ends of all bins of scores but the last.
        counts: Examples in each bin: of the reference's second half and of all looks.
        looks: Number of looks.
        log_capital: Logarithm of the first sum in :math:`E_t`; None before the first look.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    looks: int = 0
    log_capital: float | None = None

    @property
    def log_evidence(self) -> float:
        r"""Logarithm of :math:`E_t`."""
        unspent = math.log(1 / (self.looks + 1))
        return unspent if self.log_capital is None else _log_add(self.log_capital, unspent)

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "edges": list(self.edges), "counts": list(self.counts)}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Stream:
        """Return the stream that :meth:`to_plain` gave these values."""
        return cls(**{**values, "edges": tuple(values["edges"]), "counts": tuple(values["counts"])})


def begin(scores: Tensor, bins: int = BINS) -> Stream:
    """Begin a stream at a reference.

    Args:
        scores: Of the reference's examples, ``(examples,)``; every other one makes the bins, the rest is compared with.
        bins: Of scores; fewer where scores are tied.

    Raises:
        ValueError: There are fewer than two examples, or a score is not finite.
    """
    scores = _checked(scores, "the reference")
    if len(scores) < 2:
        raise ValueError(f"The reference has {len(scores)} example(s); expected at least two.")
    half = scores[::2].sort().values
    levels = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    edges = half[(levels * (len(half) - 1)).long()].unique()
    return Stream(tuple(edges.tolist()), tuple(_count(scores[1::2], edges).tolist()))


def look(stream: Stream, scores: Tensor, seed: int = 0) -> Stream:
    """Look at new examples; returns the stream with them.

    Args:
        stream: As it was.
        scores: Of the new examples, ``(examples,)``, in any order: they are taken in a random one, at most 100,000 of them.
        seed: Of that order and of the numbers that break ties; each look has its own by its number.

    Raises:
        ValueError: There is no example, or a score is not finite.
    """
    scores = _checked(scores, "the look")
    if len(scores) == 0:
        raise ValueError("A look needs at least one example.")
    number = stream.looks + 1
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    scores = scores[torch.randperm(len(scores), generator=generator)[:_LOOK]]
    edges, counts = torch.tensor(stream.edges, dtype=torch.float64), torch.tensor(stream.counts)
    which = _bin(scores, edges)
    p = conformal_p_values(counts, which, torch.rand(len(which), generator=generator, dtype=torch.float64))
    weight = -math.log(number * (number + 1))
    before = weight if stream.log_capital is None else _log_add(stream.log_capital, weight)
    capital = before + log_bet(p)
    return Stream(stream.edges, tuple((counts + _count(scores, edges)).tolist()), number, capital)


def threshold(alpha: float) -> float:
    r"""Logarithm of the evidence at which there is an alarm, :math:`\log(1/\alpha)`."""
    return -math.log(alpha)


def share(alpha: float, reference: int, streams: int) -> float:
    r"""Return the false-alarm rate of one of several streams since the :math:`r`-th reference, :math:`\alpha / (K r (r + 1))`.

    Over all references and streams these add up to :math:`\alpha`, so that it bounds the probability of any false alarm in a
    schedule of any length, whatever the streams have to do with each other.
    """
    return alpha / (streams * reference * (reference + 1))


def conformal_p_values(counts: Tensor, which: Tensor, u: Tensor) -> Tensor:
    """Smoothed conformal p-values of examples, each compared with all before it.

    Args:
        counts: Examples in each bin before the first, ``(bins,)``.
        which: Bins of the examples, ``(examples,)``.
        u: Uniform numbers, ``(examples,)``.
    """
    ones = torch.nn.functional.one_hot(which, len(counts))
    before = counts + ones.cumsum(0) - ones
    same = before.gather(1, which[:, None])[:, 0]
    at_most = before.cumsum(1).gather(1, which[:, None])[:, 0]
    total = before.sum(1)
    return ((total - at_most) + u * (1 + same)) / (total + 1)


def log_bet(p: Tensor) -> float:
    """Logarithm of the capital that the learning histogram makes of 1 by betting on p-values, ``(examples,)``."""
    bins = (p * _RANKS).long().clamp(max=_RANKS - 1)
    counts = torch.bincount(bins, minlength=_RANKS).double()
    prior = torch.tensor(_PRIORS, dtype=torch.float64)
    total, n = prior * _RANKS, counts.sum()
    each = (torch.lgamma(prior[:, None] + counts) - torch.lgamma(prior)[:, None]).sum(1)
    log_ratio = each + torch.lgamma(total) - torch.lgamma(total + n) + n * math.log(_RANKS)
    return float(torch.logsumexp(log_ratio, 0)) - math.log(len(_PRIORS))


def _bin(scores: Tensor, edges: Tensor) -> Tensor:
    return torch.bucketize(scores.contiguous(), edges)


def _count(scores: Tensor, edges: Tensor) -> Tensor:
    return torch.bincount(_bin(scores, edges), minlength=len(edges) + 1)


def _checked(scores: Tensor, what: str) -> Tensor:
    scores = scores.detach().double().flatten().cpu().contiguous()
    wrong = ~torch.isfinite(scores)
    if bool(wrong.any()):
        raise ValueError(
            f"Score {float(scores[wrong][0])} of example {int(wrong.nonzero()[0])} of {what} is not finite."
        )
    return scores


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
