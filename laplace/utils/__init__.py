"""Helpers of the core library under the public paths."""

from typing import Any

from laplace.capture.feature_extractor import FeatureExtractor, FeatureReduction
from laplace.capture.residuals import residual_noise
from laplace.enums import (
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from laplace.linalg.kronecker import Kron, KronDecomposed
from laplace.subsets.masks import (
    LastLayerSubnetMask,
    ModuleNameSubnetMask,
    ParamNameSubnetMask,
    SubnetMask,
)
from laplace.subsets.scored_masks import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    RandomSubnetMask,
)
from laplace.subsets.swag import fit_diagonal_swag_var
from laplace.utils.utils import (
    SoDSampler,
    _is_batchnorm,
    block_diag,
    diagonal_add_scalar,
    expand_prior_precision,
    fix_prior_prec_structure,
    get_nll,
    invsqrt_precision,
    kron,
    normal_samples,
    parameters_per_layer,
    symeig,
    validate,
)

__all__ = [
    "_is_batchnorm",
    "FeatureExtractor",
    "residual_noise",
    "FeatureReduction",
    "HessianStructure",
    "Kron",
    "KronDecomposed",
    "LargestMagnitudeSubnetMask",
    "LargestVarianceDiagLaplaceSubnetMask",
    "LargestVarianceSWAGSubnetMask",
    "LastLayerSubnetMask",
    "Likelihood",
    "LinkApprox",
    "ModuleNameSubnetMask",
    "ParamNameSubnetMask",
    "PredType",
    "PriorStructure",
    "RandomSubnetMask",
    "RunningNLLMetric",  # noqa: F822 (imported on first use)
    "SoDSampler",
    "SubnetMask",
    "SubsetOfWeights",
    "TuningMethod",
    "block_diag",
    "diagonal_add_scalar",
    "expand_prior_precision",
    "fit_diagonal_swag_var",
    "fix_prior_prec_structure",
    "get_nll",
    "invsqrt_precision",
    "kron",
    "normal_samples",
    "parameters_per_layer",
    "symeig",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import torchmetrics only for who wants a metric: beside a broken torchvision it cannot be imported."""
    if name != "RunningNLLMetric":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from laplace.likelihoods.running import RunningNLLMetric

    return RunningNLLMetric
