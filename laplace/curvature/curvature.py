"""The interfaces of backends, under their customary import path."""

from laplace.backends.gauss_newton import EFInterface, GGNInterface
from laplace.backends.interface import CurvatureInterface

__all__ = ["CurvatureInterface", "EFInterface", "GGNInterface"]
