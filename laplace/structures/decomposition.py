"""Eigendecompositions of summed factors one by one, for whoever spreads them over processes and keeps them."""

from __future__ import annotations

from torch import Tensor

from laplace.linalg.eigen import eigh, eigh_double
from laplace.linalg.kronecker import rounded_factor
from laplace.structures.specification import SumsSpec


def widths(spec: SumsSpec) -> dict[str, int]:
    """Width of every factor whose eigendecomposition a posterior of this kind uses, by name: none of a diagonal one."""
    if spec.structure not in ("kron", "full", "blockdiag"):
        return {}
    return {name: factor.shape[0] for name, factor in spec.factors.items() if factor.symmetric}


def decompose(spec: SumsSpec, name: str, value: Tensor, n_data: float) -> tuple[Tensor, Tensor]:
    """Eigendecompose one summed factor exactly as the posterior would.

    Args:
        spec: Of the sums.
        name: The factor.
        value: Its sum ``(width, width)``, float64.
        n_data: Number of examples in the sum.

    Returns:
        Eigenvalues ``(width,)`` in float64, ascending, and eigenvectors ``(width, width)``, in float64 of a dense sum and in
        the posterior's type of a Kronecker factor.

    Raises:
        ValueError: The factor holds NaN or Inf, or has no eigendecomposition; names it.
    """
    what = f"factor {name!r} {tuple(value.shape)}"
    if not bool(value.isfinite().all()):
        raise ValueError(f"The {what} holds NaN or Inf.")
    if spec.structure != "kron":
        return eigh_double(value, what)
    return eigh(rounded_factor(name, value, n_data, spec.torch_dtype), what)
