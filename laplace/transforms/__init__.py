"""Laplace approximations as pure functions over parameter trees, for user-defined likelihoods and streams of batches.

Every module holds one algorithm as the same four functions: ``build(...)`` gives a transform with ``init(params)``
and ``update(state, batch)``; ``sample(state)`` draws parameters. Curvature is added batch by batch to a precision,
which may start from a prior's or from that of an earlier stream.
"""

from __future__ import annotations

from laplace import _clash as _clash  # says so where laplace-torch has replaced laplace/__init__.py
from laplace.transforms import dense_ef, dense_ggn, dense_hessian, diag_fisher, diag_ggn
from laplace.transforms.states import DenseLaplaceState, DiagLaplaceState, Transform

__all__ = [
    "DenseLaplaceState",
    "DiagLaplaceState",
    "Transform",
    "dense_ef",
    "dense_ggn",
    "dense_hessian",
    "diag_fisher",
    "diag_ggn",
]
