"""Eigenvalues of symmetric positive semi-definite matrices, and of such a matrix plus a multiple of the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def eigh(M: Tensor, what: str = "matrix") -> tuple[Tensor, Tensor]:
    """Eigenvalues in float64, ascending, and eigenvectors in the type of ``M``; of its symmetric part, found in float64.

    Rows and columns of zeros, as of inputs that never fire, are eigenvectors by themselves and are left out of the search:
    with many of them, divide and conquer takes minutes where the rest takes a moment, or does not converge.

    Args:
        M: The matrix ``(n, n)``.
        what: What it is, for the error.

    Raises:
        ValueError: If no algorithm converges; names the matrix.
    """
    values, vectors = eigh_double(M, what)
    return values, vectors.to(M.dtype)


def eigh_double(M: Tensor, what: str = "matrix") -> tuple[Tensor, Tensor]:
    """As :func:`eigh`, with eigenvectors in float64 too."""
    symmetric = _symmetric(M)
    used = symmetric.any(1).nonzero().flatten()
    if len(used) == len(M):
        return _eigh_of_used(symmetric, what)
    unused = (~symmetric.any(1)).nonzero().flatten()
    some, parts = _eigh_of_used(_part(symmetric, used), what) if len(used) else (symmetric.new_zeros(0), None)
    values, order = torch.cat([some, some.new_zeros(len(unused))]).sort(stable=True)
    vectors = torch.zeros_like(symmetric)
    if parts is not None:
        vectors[used, : len(used)] = parts
    vectors[unused, torch.arange(len(used), len(M), device=M.device)] = 1
    return values, vectors[:, order]


def eigenvalues(M: Tensor, what: str = "matrix") -> Tensor:
    """Eigenvalues alone, those of :func:`eigh` but for rounding, at a fraction of its cost; arguments and errors as there."""
    symmetric = _symmetric(M)
    used = symmetric.any(1).nonzero().flatten()
    if len(used) == len(M):
        return _eigenvalues_of_used(symmetric, what)
    zeros = symmetric.new_zeros(len(M) - len(used))
    some = _eigenvalues_of_used(_part(symmetric, used), what) if len(used) else zeros[:0]
    return torch.cat([some, zeros]).sort().values


def _symmetric(M: Tensor) -> Tensor:
    """The symmetric part in float64."""
    return M.double() if torch.equal(M, M.mT) else (M.double() + M.double().mT) / 2


def _part(M: Tensor, used: Tensor) -> Tensor:
    """Some rows and the same columns."""
    return M.index_select(0, used).index_select(1, used)


def _eigh_of_used(M: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """By divide and conquer; where that does not converge, by QR iteration on the host, slower but without its failures."""
    try:
        return torch.linalg.eigh(M)
    except torch.linalg.LinAlgError as error:
        values, vectors = _by_qr_iteration(M, what, error)
        return torch.from_numpy(values).to(M.device), torch.from_numpy(vectors).to(M.device)


def _eigenvalues_of_used(M: Tensor, what: str) -> Tensor:
    """As :func:`_eigh_of_used`, without eigenvectors."""
    try:
        return torch.linalg.eigvalsh(M)
    except torch.linalg.LinAlgError as error:
        return torch.from_numpy(_by_qr_iteration(M, what, error, eigvals_only=True)).to(M.device)


def _by_qr_iteration(M: Tensor, what: str, first: Exception, **kwargs: bool) -> Any:
    import scipy.linalg  # rarely needed, and a third of a second

    try:
        return scipy.linalg.eigh(M.cpu().numpy(), driver="ev", **kwargs)
    except (scipy.linalg.LinAlgError, ValueError) as second:
        raise ValueError(
            f"The {what} has no eigendecomposition: divide and conquer fails with {first}, QR iteration with {second}. "
            "Look at the scale of the data and of the model's weights, or use hessian_structure='diag'."
        ) from second


def symeig(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite matrix, computed in float64.

    Args:
        M: The matrix ``(n, n)``.

    Returns:
        Non-negative eigenvalues ``(n,)`` in ascending order, and eigenvectors in columns, like :func:`torch.linalg.eigh`.
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
