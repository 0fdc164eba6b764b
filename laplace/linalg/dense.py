"""Dense matrices: the root of an inverse, and small helpers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def invsqrt_precision(M: Tensor) -> Tensor:
    r"""Lower triangular :math:`L` with :math:`LL^\top = M^{-1}`, from the Cholesky factor of the reversed matrix.

    Args:
        M: Symmetric matrix ``(n, n)``.

    Raises:
        ValueError: If ``M`` is not positive definite.
    """
    reversed_factor, info = torch.linalg.cholesky_ex(M.flip(-1, -2))
    if int(info) != 0:
        raise not_positive_definite()
    inverse = reversed_factor.flip(-1, -2).transpose(-1, -2)
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return torch.linalg.solve_triangular(inverse, identity, upper=False)


def parameter_vector(params: Iterable[Tensor]) -> Tensor:
    """All parameters in one vector, whatever their memory format (:func:`torch.nn.utils.parameters_to_vector` takes one)."""
    return torch.cat([p.reshape(-1) for p in params])


def not_positive_definite() -> ValueError:
    """The error of every factorisation of a precision that fails; says what to change."""
    return ValueError(
        "The posterior precision is not positive definite in this floating-point type; raise the prior precision or "
        "convert the model to float64. The Hessian of a model that is not at a minimum may have large negative eigenvalues: "
        "use a GGN backend, or hessian_structure='lowrank'."
    )


def kron(t1: Tensor, t2: Tensor) -> Tensor:
    """Kronecker product of two matrices ``t1`` and ``t2``."""
    return torch.kron(t1, t2)


def block_diag(blocks: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrix of a list ``blocks`` of matrices."""
    return torch.block_diag(*blocks)


def diagonal_add_scalar(X: Tensor, value: float | Tensor) -> Tensor:
    """``X + value · I`` for a square matrix, as a new tensor."""
    return X + value * torch.eye(len(X), dtype=X.dtype, device=X.device)
