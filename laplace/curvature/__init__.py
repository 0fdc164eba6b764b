"""Backends that compute curvature, each imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "CurvatureInterface": "laplace.curvature.curvature",
    "GGNInterface": "laplace.curvature.curvature",
    "EFInterface": "laplace.curvature.curvature",
    "NativeGGN": "laplace.curvature.native",
    "NativeEF": "laplace.curvature.native",
    "CurvlinopsInterface": "laplace.curvature.curvlinops",
    "CurvlinopsGGN": "laplace.curvature.curvlinops",
    "CurvlinopsEF": "laplace.curvature.curvlinops",
    "CurvlinopsHessian": "laplace.curvature.curvlinops",
    "HessianInterface": "laplace.curvature.hessian",
    "NativeHessian": "laplace.curvature.hessian",
    "AsdlInterface": "laplace.curvature.asdl",
    "AsdlGGN": "laplace.curvature.asdl",
    "AsdlEF": "laplace.curvature.asdl",
    "AsdlHessian": "laplace.curvature.asdl",
    "AsdfghjklInterface": "laplace.curvature.asdfghjkl",
    "AsdfghjklGGN": "laplace.curvature.asdfghjkl",
    "AsdfghjklEF": "laplace.curvature.asdfghjkl",
    "AsdfghjklHessian": "laplace.curvature.asdfghjkl",
    "BackPackInterface": "laplace.curvature.backpack",
    "BackPackGGN": "laplace.curvature.backpack",
    "BackPackEF": "laplace.curvature.backpack",
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
