"""Leading eigenpairs of a symmetric matrix that is given by its products with vectors alone.

The block Lanczos method with full reorthogonalisation finds the largest eigenvalues in a Krylov space of these products (Golub
and Van Loan, "Matrix Computations", 4th ed., §10.3.6).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from laplace.linalg import memory

_OVERSAMPLE = 4  # vectors in a block beyond the rank that is asked for
_PASSES = 60  # passes over the data before the search is stopped
_FINEST = 1e-10  # residual, relative to the largest eigenvalue, that is small enough for any use


def block_lanczos(
    product: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Positive eigenpairs among the ``rank`` largest of a symmetric matrix that is given by its products.

    The start is drawn with a fixed seed, so equal products give equal results. All but the products themselves is done in
    float64: eigenvalues far below the largest one then come out as precisely as the products are.

    Args:
        product: Maps ``(size, k)`` in float64 to the matrix times it.
        size: Width of the matrix.
        rank: How many eigenpairs at most.
        dtype: Floating-point type whose precision the products have. The search ends when the residuals come near to it, or
            stop falling.
        device: Where to work.

    Returns:
        Vectors ``(size, k)`` and values ``(k,)``, falling, both float64.

    Raises:
        NotEnoughMemoryError: If the vectors cannot fit into memory.

    Warns:
        UserWarning: If the residuals are still large after 60 products.
    """
    if rank < 1:
        raise ValueError(f"The rank must be at least 1, got {rank}.")
    width, precision = min(size, rank + _OVERSAMPLE), torch.finfo(dtype).eps
    tolerance = max(4 * precision, _FINEST)
    _require(size, 4 * width, device)
    basis = torch.linalg.qr(_start(size, width).to(device))[0]
    images = newest = product(basis)
    before = math.inf
    for _ in range(_PASSES - 1):
        values, vectors, residual, scale = _ritz(basis, images, rank)
        block = _new_directions(basis, newest, tolerance * scale)
        stuck = before / 2 < residual <= 100 * tolerance * scale
        if residual <= tolerance * scale or stuck or block.shape[1] == 0:
            break
        _require(size, 2 * basis.shape[1] + 5 * block.shape[1], device)
        before, newest = residual, product(block)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, newest], 1)
    else:
        values, vectors, residual, scale = _ritz(basis, images, rank)
        if residual > 1e3 * tolerance * scale:
            warnings.warn(
                f"The eigenpairs have not converged after {_PASSES} passes over the data: residual {residual / scale:.1e} of "
                "the largest eigenvalue. Ask for fewer.",
                stacklevel=2,
            )
    keep = values > max(precision * scale, _FINEST / 4 * scale, min(residual, tolerance * scale))
    return vectors[:, keep].contiguous(), values[keep]


def _require(size: int, vectors: int, device: torch.device | str) -> None:
    """Stop before vectors that cannot fit into memory."""
    memory.require(
        memory.tensor_bytes(size, vectors),
        device,
        f"The search for eigenpairs among {size:,} parameters",
        "Lower low_rank, or use hessian_structure='kron' or 'diag'.",
    )


def _ritz(basis: Tensor, images: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Largest Ritz values and their vectors, their worst residual, and the size of the matrix."""
    small = basis.T @ images
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    scale = float(values.abs().max())
    values, rotation = values.flip(0)[:rank], rotation.flip(1)[:, :rank]
    vectors = basis @ rotation
    residual = float((images @ rotation - vectors * values).norm(dim=0).max())
    return values, vectors, residual, scale


def _new_directions(basis: Tensor, images: Tensor, smallest: float) -> Tensor:
    """Orthonormal directions of the images outside the basis, but for those shorter than ``smallest``."""
    block = images - basis @ (basis.T @ images)
    left, lengths, _ = torch.linalg.svd(block, full_matrices=False)
    left = left[:, lengths > smallest][:, : basis.shape[0] - basis.shape[1]]
    left = left - basis @ (basis.T @ left)
    return torch.linalg.qr(left)[0]


def _start(size: int, width: int) -> Tensor:
    """Where the search starts: standard normal numbers, drawn on the host, so that they are the same everywhere."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(size, width, generator=generator, device="cpu").double()
