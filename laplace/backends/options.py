"""Options that the methods of backends take by name: honoured for that call, or refused; never ignored."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

APPROXIMATIONS = ("expand", "reduce")
_ATTRIBUTES = {"mc_samples": "num_samples", "kfac_approx": "kfac_approx"}


def honours(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let ``full``, ``kron`` or ``diag`` of a backend take these options and no others.

    ``N``, the number of examples, is taken by all of them; without Kronecker factors nothing is divided by it.

    Args:
        *names: ``'mc_samples'`` (labels drawn per example, of a sampled Fisher), ``'kfac_approx'`` (``'expand'`` or
            ``'reduce'``).
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        divides = "N" in inspect.signature(method).parameters

        @functools.wraps(method)
        def wrapper(self: Any, x: Any, y: Any, *args: Any, **options: Any) -> Any:
            own = {"N": options.pop("N")} if "N" in options else {}
            with _set(self, method.__name__, names, options):
                return method(self, x, y, *args, **(own if divides else {}))

        return wrapper

    return decorate


def check_kfac_approx(value: str) -> str:
    """Refuse an unknown approximation of weight sharing.

    Raises:
        ValueError: If it is neither ``'expand'`` nor ``'reduce'``.
    """
    if value not in APPROXIMATIONS:
        raise ValueError(f"kfac_approx={value!r} is unknown; valid values are 'expand' and 'reduce'.")
    return value


def check_chosen_outputs(outputs: Sequence[int], stochastic: bool) -> tuple[int, ...]:
    """Refuse a choice of outputs that is none; returns it in ascending order.

    Raises:
        ValueError: If it is empty, names an output twice or a negative one, or is to be sampled.
    """
    chosen = tuple(sorted(outputs))
    if not chosen or chosen[0] < 0 or len(set(chosen)) < len(chosen):
        raise ValueError(f"outputs={list(outputs)}: give distinct indices of outputs, from 0 on, and one at least.")
    if stochastic:
        raise ValueError(f"outputs={list(outputs)} chooses outputs of the exact GGN; leave it or stochastic=True out.")
    return chosen


@contextmanager
def _set(backend: Any, method: str, names: tuple[str, ...], options: dict[str, Any]) -> Iterator[None]:
    """Give a backend these options inside the block."""
    where = f"{type(backend).__name__}.{method}()"
    for name, value in options.items():
        if name not in names:
            valid = ", ".join(repr(n) for n in ("N", *names))
            raise ValueError(f"{where} takes no option {name!r}; valid are {valid}. The native backend takes the most.")
        if name == "mc_samples":
            _check_samples(where, backend, value)
        else:
            check_kfac_approx(value)
    before = {_ATTRIBUTES[name]: getattr(backend, _ATTRIBUTES[name]) for name in options}
    try:
        for name, value in options.items():
            setattr(backend, _ATTRIBUTES[name], value)
        yield
    finally:
        for name, value in before.items():
            setattr(backend, name, value)


def _check_samples(where: str, backend: Any, value: Any) -> None:
    if not backend.stochastic:
        raise ValueError(
            f"{where} draws no labels, so mc_samples={value!r} means nothing; use a GGN backend with "
            "backend_kwargs={'stochastic': True}."
        )
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"mc_samples={value!r} must be an integer of at least 1.")
