"""From what users give for a likelihood to its object, and back to the word that they know it by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from laplace.enums import Likelihood
from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.categorical import Categorical
from laplace.likelihoods.gaussian import Gaussian
from laplace.likelihoods.preference import Preference

NAMED: dict[str, Callable[[], BaseLikelihood]] = {
    Likelihood.REGRESSION: Gaussian,
    Likelihood.CLASSIFICATION: Categorical,
    Likelihood.REWARD_MODELING: Preference,
}


def likelihood_of(value: BaseLikelihood | Likelihood | str) -> BaseLikelihood:
    """The object for a name; an object as it is.

    Args:
        value: ``'classification'``, ``'regression'``, … or an object of :mod:`laplace.likelihoods`.

    Raises:
        ValueError: If it is neither; the message lists the names.
    """
    if isinstance(value, BaseLikelihood):
        return value
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]()
    valid = ", ".join(repr(str(name)) for name in NAMED)
    advice = "make an object of it" if isinstance(value, type) else "or give an object of laplace.likelihoods"
    raise ValueError(f"likelihood={value!r} is unknown; valid values are {valid}, {advice}.")


class NamedLikelihood:
    """The attribute ``likelihood``: set by word or object, read as the word where there is one, else as the object.

    The object itself is the owner's ``likelihood_object``, a property where something follows from it.
    """

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        """The word or the object."""
        return self if owner is None else (owner.likelihood_object.word or owner.likelihood_object)

    def __set__(self, owner: Any, value: BaseLikelihood | Likelihood | str) -> None:
        """Set both.

        Raises:
            ValueError: If it is no likelihood.
        """
        owner.likelihood_object = likelihood_of(value)
