"""Backends that compute curvature, each imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "CurvatureInterface": "laplace.backends.interface",
    "GGNInterface": "laplace.backends.gauss_newton",
    "EFInterface": "laplace.backends.gauss_newton",
    "NativeGGN": "laplace.backends.native",
    "NativeEF": "laplace.backends.native",
    "CurvlinopsInterface": "laplace.backends.curvlinops",
    "CurvlinopsGGN": "laplace.backends.curvlinops",
    "CurvlinopsEF": "laplace.backends.curvlinops",
    "CurvlinopsHessian": "laplace.backends.curvlinops",
    "HessianInterface": "laplace.backends.hessian",
    "NativeHessian": "laplace.backends.hessian",
    "AsdlInterface": "laplace.backends.asdl",
    "AsdlGGN": "laplace.backends.asdl",
    "AsdlEF": "laplace.backends.asdl",
    "AsdlHessian": "laplace.backends.asdl",
    "AsdfghjklInterface": "laplace.backends.asdfghjkl",
    "AsdfghjklGGN": "laplace.backends.asdfghjkl",
    "AsdfghjklEF": "laplace.backends.asdfghjkl",
    "AsdfghjklHessian": "laplace.backends.asdfghjkl",
    "BackPackInterface": "laplace.backends.backpack",
    "BackPackGGN": "laplace.backends.backpack",
    "BackPackEF": "laplace.backends.backpack",
}

_BACKENDS = {
    "native": ("NativeGGN", "NativeEF"),
    "curvlinops": ("CurvlinopsGGN", "CurvlinopsEF"),
    "asdl": ("AsdlGGN", "AsdlEF"),
    "backpack": ("BackPackGGN", "BackPackEF"),
}

ESTIMATORS = ("ggn", "mc", "ef")

__all__ = [*_WHERE, "ESTIMATORS", "backend_class", "backend_names"]


def backend_names() -> list[str]:
    """Names accepted by :func:`backend_class`."""
    return list(_BACKENDS)


def backend_class(name: str, estimator: str = "ggn") -> tuple[type, dict[str, Any]]:
    """The class of a backend by name, and the keyword arguments that select the estimator.

    Args:
        name: One of :func:`backend_names`.
        estimator: ``'ggn'`` (exact), ``'mc'`` (Monte-Carlo Fisher) or ``'ef'`` (empirical Fisher).

    Raises:
        ValueError: On an unknown name or estimator.
        ImportError: If the backend's package is missing or broken; says what to install or how to mend it.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; valid backends are {', '.join(map(repr, _BACKENDS))}.")
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator={estimator!r} is unknown; valid estimators are {', '.join(map(repr, ESTIMATORS))}."
        )
    ggn, ef = _BACKENDS[name]
    if estimator == "ef":
        return __getattr__(ef), {}
    return __getattr__(ggn), {"stochastic": True} if estimator == "mc" else {}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
