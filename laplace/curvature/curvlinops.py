"""The backends of curvlinops, under their customary import path."""

from laplace.backends.curvlinops import CurvlinopsEF, CurvlinopsGGN, CurvlinopsHessian, CurvlinopsInterface

__all__ = ["CurvlinopsEF", "CurvlinopsGGN", "CurvlinopsHessian", "CurvlinopsInterface"]
