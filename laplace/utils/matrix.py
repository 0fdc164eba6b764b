"""Kronecker-factored matrices, under their customary import path."""

from laplace.linalg.kronecker import Kron, KronDecomposed

__all__ = ["Kron", "KronDecomposed"]
