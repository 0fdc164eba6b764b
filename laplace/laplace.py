"""The factory: strings in, posterior class out."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace.enums import HessianStructure, Likelihood, SubsetOfWeights, parse
from laplace.likelihoods.base import BaseLikelihood
from laplace.posterior.blockdiag import BlockDiagLaplace
from laplace.posterior.diag import DiagLaplace
from laplace.posterior.ekfac import EKFACLaplace
from laplace.posterior.full import FullLaplace
from laplace.posterior.functional import FunctionalLaplace
from laplace.posterior.kron import KronLaplace
from laplace.posterior.lowrank import LowRankLaplace
from laplace.posterior.parametric import ParametricLaplace
from laplace.subsets.last_layer import DiagLLLaplace, EKFACLLLaplace, FullLLLaplace, FunctionalLLLaplace, KronLLLaplace
from laplace.subsets.subnetwork import DiagSubnetLaplace, FullSubnetLaplace

_CLASSES: dict[tuple[str, str], type[ParametricLaplace]] = {
    ("all", "full"): FullLaplace,
    ("all", "kron"): KronLaplace,
    ("all", "ekfac"): EKFACLaplace,
    ("all", "diag"): DiagLaplace,
    ("all", "blockdiag"): BlockDiagLaplace,
    ("all", "lowrank"): LowRankLaplace,
    ("all", "gp"): FunctionalLaplace,
    ("last_layer", "full"): FullLLLaplace,
    ("last_layer", "kron"): KronLLLaplace,
    ("last_layer", "ekfac"): EKFACLLLaplace,
    ("last_layer", "diag"): DiagLLLaplace,
    ("last_layer", "gp"): FunctionalLLLaplace,
    ("subnetwork", "full"): FullSubnetLaplace,
    ("subnetwork", "diag"): DiagSubnetLaplace,
}


def Laplace(
    model: nn.Module,
    likelihood: BaseLikelihood | Likelihood | str,
    subset_of_weights: SubsetOfWeights | str = SubsetOfWeights.LAST_LAYER,
    hessian_structure: HessianStructure | str = HessianStructure.KRON,
    *args: Any,
    **kwargs: Any,
) -> ParametricLaplace:
    """Make a Laplace approximation of a trained network.

    Args:
        model: Trained network that returns logits or regression means.
        likelihood: ``'classification'``, ``'regression'`` or ``'reward_modeling'``; or an object of
            :mod:`laplace.likelihoods`, yours among them.
        subset_of_weights: ``'last_layer'``, ``'all'`` or ``'subnetwork'`` (which needs ``subnetwork_indices``).
        hessian_structure: ``'kron'``, ``'ekfac'``, ``'full'``, ``'diag'``, ``'gp'``, or, over all
            weights, ``'lowrank'`` or ``'blockdiag'``.
        *args: Further arguments of the class, see :class:`laplace.BaseLaplace`.
        **kwargs: Further arguments of the class.

    Raises:
        ValueError: On an unknown or unavailable combination; the message lists the valid ones.
    """
    subset = parse(SubsetOfWeights, subset_of_weights, "subset_of_weights")
    structure = parse(HessianStructure, hessian_structure, "hessian_structure")
    key = (subset.value, structure.value)
    if key not in _CLASSES:
        valid = ", ".join(f"{s} × {h}" for s, h in _CLASSES)
        raise ValueError(f"There is no Laplace approximation for {key[0]} × {key[1]}; available are {valid}.")
    return _CLASSES[key](model, likelihood, *args, **kwargs)
