"""The backends of BackPACK, under their customary import path."""

from laplace.backends.backpack import BackPackEF, BackPackGGN, BackPackInterface

__all__ = ["BackPackEF", "BackPackGGN", "BackPackInterface"]
