"""Helpers of the core library under the public paths."""

from __future__ import annotations

from laplace.utils.enums import (
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from laplace.utils.feature_extractor import FeatureExtractor, FeatureReduction
from laplace.utils.matrix import Kron, KronDecomposed, symeig

__all__ = [
    "FeatureExtractor",
    "FeatureReduction",
    "HessianStructure",
    "Kron",
    "KronDecomposed",
    "Likelihood",
    "LinkApprox",
    "PredType",
    "PriorStructure",
    "SubsetOfWeights",
    "TuningMethod",
    "symeig",
]
