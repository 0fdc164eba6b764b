"""The backends of ASDL under the names of its earlier releases, under their customary import path."""

from laplace.backends.asdfghjkl import AsdfghjklEF, AsdfghjklGGN, AsdfghjklHessian, AsdfghjklInterface

__all__ = ["AsdfghjklEF", "AsdfghjklGGN", "AsdfghjklHessian", "AsdfghjklInterface"]
