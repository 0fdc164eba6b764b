"""The last-layer posteriors, under their customary import path."""

from laplace.subsets.last_layer import DiagLLLaplace, FullLLLaplace, FunctionalLLLaplace, KronLLLaplace, LLLaplace

__all__ = ["DiagLLLaplace", "FullLLLaplace", "FunctionalLLLaplace", "KronLLLaplace", "LLLaplace"]
