"""The interfaces of backends, under their customary import path."""

from laplace.curvature.gauss_newton import EFInterface, GGNInterface
from laplace.curvature.interface import CurvatureInterface

__all__ = ["CurvatureInterface", "EFInterface", "GGNInterface"]
