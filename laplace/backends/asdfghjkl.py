"""The ASDL backends under the names of the package's earlier releases."""

from __future__ import annotations

from laplace.backends.asdl import AsdlEF, AsdlGGN, AsdlHessian, AsdlInterface


class AsdfghjklInterface(AsdlInterface):
    """Same as :class:`laplace.curvature.asdl.AsdlInterface`."""


class AsdfghjklGGN(AsdfghjklInterface, AsdlGGN):
    """Same as :class:`laplace.curvature.asdl.AsdlGGN`."""


class AsdfghjklEF(AsdfghjklInterface, AsdlEF):
    """Same as :class:`laplace.curvature.asdl.AsdlEF`."""


class AsdfghjklHessian(AsdlHessian):
    """Same as :class:`laplace.curvature.asdl.AsdlHessian`."""


__all__ = ["AsdfghjklEF", "AsdfghjklGGN", "AsdfghjklHessian", "AsdfghjklInterface"]
