"""The variance of weights along SGD, under its customary import path."""

from laplace.subsets.swag import fit_diagonal_swag_var

__all__ = ["fit_diagonal_swag_var"]
