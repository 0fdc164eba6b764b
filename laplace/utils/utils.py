"""Small helpers under their customary import path; :mod:`laplace.utils` has them all."""

from laplace.data.subset import SoDSampler
from laplace.likelihoods.links import gaussian_samples as normal_samples
from laplace.likelihoods.scores import get_nll
from laplace.linalg.dense import block_diag, diagonal_add_scalar, invsqrt_precision, kron
from laplace.linalg.eigen import symeig
from laplace.prior import expand_prior_precision, fix_prior_prec_structure, parameters_per_layer
from laplace.subsets.swag import is_batchnorm as _is_batchnorm
from laplace.tuning import validate

__all__ = [
    "_is_batchnorm",
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
]
