"""The last-layer posteriors, under their customary import path."""

from laplace.subsets.last_layer import (
    DiagLLLaplace,
    EKFACLLLaplace,
    FullLLLaplace,
    FunctionalLLLaplace,
    KronLLLaplace,
    LLLaplace,
)

__all__ = ["DiagLLLaplace", "EKFACLLLaplace", "FullLLLaplace", "FunctionalLLLaplace", "KronLLLaplace", "LLLaplace"]
