"""The backends of ASDL, under their customary import path."""

from laplace.backends.asdl import AsdlEF, AsdlGGN, AsdlHessian, AsdlInterface

__all__ = ["AsdlEF", "AsdlGGN", "AsdlHessian", "AsdlInterface"]
