"""The structures over all weights, under their customary import path."""

from laplace.posterior.base import BaseLaplace
from laplace.posterior.blockdiag import BlockDiagLaplace
from laplace.posterior.diag import DiagLaplace
from laplace.posterior.ekfac import EKFACLaplace
from laplace.posterior.full import FullLaplace
from laplace.posterior.functional import FunctionalLaplace
from laplace.posterior.kron import KronLaplace
from laplace.posterior.lowrank import LowRankLaplace
from laplace.posterior.parametric import ParametricLaplace

__all__ = [
    "BaseLaplace",
    "BlockDiagLaplace",
    "DiagLaplace",
    "EKFACLaplace",
    "FullLaplace",
    "FunctionalLaplace",
    "KronLaplace",
    "LowRankLaplace",
    "ParametricLaplace",
]
