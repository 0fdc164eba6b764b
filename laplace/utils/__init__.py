"""Helpers of the core library under the public paths."""

from __future__ import annotations

import importlib
from typing import Any

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
from laplace.utils.matrix import Kron, KronDecomposed

# Imported on first use: some need posteriors, which need this package; one needs torchmetrics.
_WHERE = {
    "laplace.utils.running": ["RunningNLLMetric"],
    "laplace.utils.subnetmask": [
        "LargestMagnitudeSubnetMask",
        "LargestVarianceDiagLaplaceSubnetMask",
        "LargestVarianceSWAGSubnetMask",
        "LastLayerSubnetMask",
        "ModuleNameSubnetMask",
        "ParamNameSubnetMask",
        "RandomSubnetMask",
        "SubnetMask",
    ],
    "laplace.utils.swag": ["fit_diagonal_swag_var"],
    "laplace.utils.utils": [
        "SoDSampler",
        "block_diag",
        "diagonal_add_scalar",
        "expand_prior_precision",
        "fix_prior_prec_structure",
        "get_nll",
        "invsqrt_precision",
        "kron",
        "normal_samples",
        "parameters_per_layer",
        "symeig",
        "validate",
    ],
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

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
    *_MODULE_OF,
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
