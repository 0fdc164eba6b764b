"""Laplace approximations of trained networks: calibrated uncertainty after the fact."""

from __future__ import annotations

from laplace.errors import NonFiniteError, NotFittedError
from laplace.laplace import Laplace
from laplace.posterior.base import BaseLaplace
from laplace.posterior.diag import DiagLaplace
from laplace.posterior.full import FullLaplace
from laplace.posterior.kron import KronLaplace
from laplace.posterior.last_layer import DiagLLLaplace, FullLLLaplace, KronLLLaplace, LLLaplace
from laplace.posterior.parametric import ParametricLaplace
from laplace.utils.enums import (
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)

__all__ = [
    "BaseLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "FullLLLaplace",
    "FullLaplace",
    "HessianStructure",
    "KronLLLaplace",
    "KronLaplace",
    "LLLaplace",
    "Laplace",
    "Likelihood",
    "LinkApprox",
    "NonFiniteError",
    "NotFittedError",
    "ParametricLaplace",
    "PredType",
    "PriorStructure",
    "SubsetOfWeights",
    "TuningMethod",
]
