"""Laplace approximations of trained networks: calibrated uncertainty after the fact."""

from __future__ import annotations

from laplace import _clash as _clash
from laplace.enums import (
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from laplace.errors import NonFiniteError, NotEnoughMemoryError, NotFittedError
from laplace.laplace import Laplace
from laplace.marglik_training import marglik_training
from laplace.posterior.base import BaseLaplace
from laplace.posterior.blockdiag import BlockDiagLaplace
from laplace.posterior.diag import DiagLaplace
from laplace.posterior.ekfac import EKFACLaplace
from laplace.posterior.full import FullLaplace
from laplace.posterior.functional import FunctionalLaplace
from laplace.posterior.kron import KronLaplace
from laplace.posterior.lowrank import LowRankLaplace
from laplace.posterior.parametric import ParametricLaplace
from laplace.posterior.sketched import SketchedLowRankLaplace
from laplace.subsets.last_layer import (
    DiagLLLaplace,
    EKFACLLLaplace,
    FullLLLaplace,
    FunctionalLLLaplace,
    KronLLLaplace,
    LLLaplace,
)
from laplace.subsets.subnetwork import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace

__all__ = [
    "BaseLaplace",
    "BlockDiagLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "DiagSubnetLaplace",
    "EKFACLLLaplace",
    "EKFACLaplace",
    "FullLLLaplace",
    "FullLaplace",
    "FullSubnetLaplace",
    "FunctionalLLLaplace",
    "FunctionalLaplace",
    "HessianStructure",
    "KronLLLaplace",
    "KronLaplace",
    "LLLaplace",
    "Laplace",
    "Likelihood",
    "LinkApprox",
    "LowRankLaplace",
    "NonFiniteError",
    "NotEnoughMemoryError",
    "NotFittedError",
    "ParametricLaplace",
    "PredType",
    "PriorStructure",
    "SketchedLowRankLaplace",
    "SubnetLaplace",
    "SubsetOfWeights",
    "TuningMethod",
    "marglik_training",
]
