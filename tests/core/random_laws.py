"""Likelihoods beyond the words for random models: the library's object, its definition for one example, and targets."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from laplace.likelihoods import Bernoulli, HeteroscedasticGaussian, Poisson, WeightedCategorical

from . import naive_likelihoods

WEIGHTS = {"class_weights": [0.5, 2.0, 1.5], "label_smoothing": 0.1, "ignore_index": 1}


@dataclass(frozen=True)
class Law:
    """One likelihood.

    Attributes:
        ours: The library's.
        naive: Has ``loss(f, y)`` and ``hessian(f, y)`` of one example.
        targets: Draws so many targets for so many outputs.
        outputs: Numbers of outputs to draw from.
    """

    ours: Any
    naive: Any
    targets: Callable[[int, int], torch.Tensor]
    outputs: tuple[int, ...] = (2, 3)


LAWS = {
    "bernoulli": Law(Bernoulli(), naive_likelihoods.Bernoulli(), lambda n, c: torch.randint(2, (n, c)), (1, 2, 3)),
    "poisson": Law(Poisson(), naive_likelihoods.Poisson(), lambda n, c: torch.randint(4, (n, c))),
    "heteroscedastic": Law(
        HeteroscedasticGaussian(),
        naive_likelihoods.Heteroscedastic(),
        lambda n, c: torch.randn(n, c // 2),
        (2, 4),
    ),
    "weighted": Law(
        WeightedCategorical(**WEIGHTS), naive_likelihoods.Weighted(**WEIGHTS), lambda n, c: torch.randint(3, (n,)), (3,)
    ),
}


def outputs_of(likelihood: str, rng: random.Random) -> int:
    """How many outputs a model has."""
    return rng.choice(LAWS[likelihood].outputs) if likelihood in LAWS else rng.randint(2, 3)
