"""From the setting to the likelihood: by the library's names, or by an import path to the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import copy
from typing import Any

from laplace.likelihoods import BaseLikelihood
from laplace.likelihoods import likelihood_of as named
from laplace_dist.config.import_path import load_callable
from laplace_dist.errors import SettingsError


def likelihood_of(text: str) -> BaseLikelihood:
    """Return the likelihood that `--likelihood` names.

    Args:
        text: A name, or an import path `module:callable` whose callable takes no arguments.

    Raises:
        SettingsError: There is no such callable, or it makes no likelihood.
    """
    if ":" not in text:
        return named(text)
    make = load_callable(text, "--likelihood")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise SettingsError(
            f"--likelihood: {text!r} cannot be called without arguments ({error}); name a function that returns the likelihood"
        ) from error
    found = make()
    if not isinstance(found, BaseLikelihood):
        raise SettingsError(
            f"--likelihood: {text!r} returned a {type(found).__name__}; expected a subclass of "
            "laplace.likelihoods.BaseLikelihood"
        )
    return found


def likelihood_of_run(settings: Mapping[str, Any]) -> BaseLikelihood:
    """Return the likelihood of a run, which draws targets as that of its sums does.

    Args:
        settings: Of its plan; that of a run of 0.1 does not say how targets are drawn.

    Raises:
        SettingsError: As of `likelihood_of`.
    """
    found = likelihood_of(settings["likelihood"])
    sampling = settings.get("sampling", 1)
    if settings["estimator"] == "mc" and found.sampling != sampling:
        found = copy(found)
        found.sampling = sampling
    return found
