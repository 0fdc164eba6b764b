"""The last-layer posteriors, under their customary import path."""

from laplace.posterior.functional import FunctionalLLLaplace
from laplace.posterior.last_layer import DiagLLLaplace, FullLLLaplace, KronLLLaplace, LLLaplace

__all__ = ["DiagLLLaplace", "FullLLLaplace", "FunctionalLLLaplace", "KronLLLaplace", "LLLaplace"]
