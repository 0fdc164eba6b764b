"""Backends that compute curvature, each imported on first use, under their customary import path."""

from __future__ import annotations

from typing import Any

from laplace import backends

__all__ = list(backends.__all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(backends, name)
