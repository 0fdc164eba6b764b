"""The laws of sums as tests to inherit, under their public import path."""

from laplace.backends.conformance import SumsConformance

__all__ = ["SumsConformance"]
