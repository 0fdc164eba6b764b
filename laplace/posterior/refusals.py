"""What posteriors that are no sums over data, or have no distribution over weights, cannot do; they say why."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from laplace.structures.sums import CurvatureSums


def check_structure(backend: Any, structure: str, why: str, instead: str) -> None:
    """Refuse a backend that cannot add up a structure.

    Args:
        backend: Its class; None for the native one.
        structure: The structure.
        why: What it gives in place of it.
        instead: A structure that it may have.

    Raises:
        ValueError: Naming the backend.
    """
    if backend is not None and not backend.has_structure(structure):
        raise ValueError(
            f"{backend.__name__} has no {structure!r} curvature: {why}. Use the native backend (NativeGGN or NativeEF), or "
            f"hessian_structure={instead!r}."
        )


class NotASum:
    """Of a posterior whose curvature does not add up over batches.

    Attributes:
        why_not: What kind of posterior it is, why it does not add up, and what to do instead.
    """

    why_not: str

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{what} is not possible for {self.why_not}")

    def zero_sums(self) -> CurvatureSums:
        """Refused: it is not a sum."""
        self._refuse("zero_sums()")

    def accumulate(self, sums: CurvatureSums, x: Any, y: Tensor, offset: int = 0, example_weights: Any = None) -> None:
        """Refused: it is not a sum."""
        self._refuse("accumulate()")


class NoWeights(NotASum):
    """Of a posterior over functions."""

    def set_sums(self, sums: CurvatureSums) -> None:
        """Refused: it is not a sum."""
        self._refuse("set_sums()")

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Refused: draw functions with ``functional_samples`` or ``predictive_samples``."""
        self._refuse("sample()")

    @property
    def posterior_precision(self) -> Any:
        """Refused: there is no distribution over weights."""
        self._refuse("posterior_precision")

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """Refused: there is no distribution over weights."""
        self._refuse("log_prob()")

    def square_norm(self, value: Tensor) -> Tensor:
        """Refused: there is no distribution over weights."""
        self._refuse("square_norm()")
