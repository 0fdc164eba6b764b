"""Several passes over the same data: the loader has to give it again, and a sampled Fisher the same draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from laplace.noise import fresh_seed


def refuse_iterator(loader: Iterable, what: str) -> None:
    """Refuse what can be passed through only once.

    Args:
        loader: The batches.
        what: What passes over them several times, as the start of a sentence.

    Raises:
        ValueError: If it is an iterator.
    """
    if isinstance(loader, Iterator):
        raise ValueError(f"{what} passes over the data several times; give a DataLoader or list, not an iterator.")


def check_same(first: tuple[int, float], now: tuple[int, float], what: str) -> None:
    """Refuse data that changes between passes.

    Args:
        first: Number of examples and summed loss of the first pass.
        now: Those of this one.
        what: What needs the same data, as the start of a sentence.

    Raises:
        ValueError: If the number of examples differs, or the loss by more than rounding.
    """
    if now[0] != first[0] or abs(now[1] - first[1]) > 1e-3 * abs(first[1]):
        raise ValueError(
            f"The data changes between passes: {first[0]} examples of summed loss {first[1]:.6g} first, then {now[0]} of "
            f"{now[1]:.6g}. {what} needs a loader without random augmentation or sampling."
        )


@contextmanager
def one_seed(backend: Any) -> Iterator[None]:
    """Give a sampled Fisher the same draws in every pass."""
    if not backend.stochastic or backend.seed is not None:
        yield
        return
    backend.seed = fresh_seed()
    try:
        yield
    finally:
        backend.seed = None
