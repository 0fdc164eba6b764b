"""The vocabulary of the public interface, as string enumerations."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import TypeVar


class SubsetOfWeights(StrEnum):
    """Which weights are treated probabilistically."""

    ALL = "all"
    LAST_LAYER = "last_layer"
    SUBNETWORK = "subnetwork"


class HessianStructure(StrEnum):
    """Sparsity of the Hessian approximation."""

    FULL = "full"
    KRON = "kron"
    EKFAC = "ekfac"
    DIAG = "diag"
    BLOCKDIAG = "blockdiag"
    LOWRANK = "lowrank"
    GP = "gp"


class Likelihood(StrEnum):
    """Likelihood of the targets given the network's outputs."""

    REGRESSION = "regression"
    CLASSIFICATION = "classification"
    REWARD_MODELING = "reward_modeling"


class PredType(StrEnum):
    """Type of posterior predictive."""

    GLM = "glm"
    NN = "nn"
    GP = "gp"


class LinkApprox(StrEnum):
    """How the classification link is integrated against the Gaussian over the outputs."""

    MC = "mc"
    PROBIT = "probit"
    BRIDGE = "bridge"
    BRIDGE_NORM = "bridge_norm"


class TuningMethod(StrEnum):
    """How the prior precision is chosen after the fit."""

    MARGLIK = "marglik"
    GRIDSEARCH = "gridsearch"


class PriorStructure(StrEnum):
    """Structure of the Gaussian prior's precision."""

    SCALAR = "scalar"
    DIAG = "diag"
    LAYERWISE = "layerwise"


_E = TypeVar("_E", bound=Enum)


def parse(kind: type[_E], value: _E | str, name: str) -> _E:
    """Turn a string into the enumeration's member.

    Raises:
        ValueError: If ``value`` is not a member; the message lists the valid ones.
    """
    try:
        return kind(value)
    except ValueError:
        valid = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{name}={value!r} is unknown; valid values are {valid}.") from None
