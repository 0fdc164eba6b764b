"""Eigenvalues of symmetric positive semi-definite matrices, and of such a matrix plus a multiple of the identity."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in float64, ascending, and eigenvectors in the type of ``M``; of its symmetric part, found in float64."""
    values, vectors = torch.linalg.eigh((M.double() + M.double().mT) / 2)
    return values, vectors.to(M.dtype)


def symeig(M: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative eigenvalues in ascending order, and eigenvectors, of a symmetric positive semi-definite matrix.

    Computed in float64; the order of the pair is that of :func:`torch.linalg.eigh`.
    """
    values, vectors = eigh(M)
    return values.clamp(min=0).to(M.dtype), vectors


def shifted(values: Tensor, delta: Tensor) -> Tensor:
    r"""Eigenvalues of a semi-definite matrix plus :math:`\delta \ge 0`, never below :math:`\delta / 2`.

    Eigenvalues that are zero scatter about zero by the rounding of the matrix. To set the negative ones to zero would leave the
    positive ones alone, and add a bias to every sum over many of them, such as a log determinant; their errors cancel if both
    signs are kept. Only those that would come near to making the matrix singular are stopped.
    """
    return torch.maximum(values, -delta / 2) + delta
