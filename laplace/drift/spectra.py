r"""How far the spectrum of a curvature factor has moved from one window of data to the next."""

from __future__ import annotations

import torch
from torch import Tensor


def spectrum(factor: Tensor, n_data: float, *, symmetric: bool) -> Tensor:
    r"""Return the sorted eigenvalues of a factor per example: of matrices :math:`\lambda(A / n)`, of a diagonal its entries.

    Args:
        factor: Symmetric matrices ``(…, d, d)``, or a diagonal of any shape.
        n_data: Number of examples that it is a sum over.
        symmetric: Which of the two.
    """
    factor = factor.double() / n_data
    return (torch.linalg.eigvalsh(factor) if symmetric else factor).flatten().sort().values


def relative_distance(one: Tensor, other: Tensor) -> float:
    r"""Return :math:`\lVert\lambda - \lambda'\rVert / \lVert\lambda'\rVert` of two sorted spectra.

    By Hoffman and Wielandt ("The variation of the spectrum of a normal matrix", 1953) it is at most the relative distance of
    the matrices in the Frobenius norm: what it shows did change. Infinite where the other spectrum is zero and the one is not.
    """
    difference, scale = (one - other).norm(), other.norm()
    return float(difference / scale) if scale > 0 else (0.0 if difference == 0 else float("inf"))
