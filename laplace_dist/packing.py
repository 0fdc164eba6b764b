"""Names that are safe as keys, and symmetric matrices kept as one triangle."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import numpy as np

from laplace_dist.errors import CheckpointError


def check_key(key: str) -> str:
    """Return the key if it is a plain relative path that cannot leave the checkpoint.

    Raises:
        CheckpointError: For an absolute path, an empty part, `.`, `..`, a backslash or a control character.
    """
    bad = any(part in ("", ".", "..") for part in key.split("/"))
    if bad or "\\" in key or not key.isprintable():
        raise CheckpointError(
            f"{key!r} is not a key inside the checkpoint: expected parts joined by single slashes, without '..', "
            "backslashes or control characters. If it comes from a manifest, that manifest was altered; delete it."
        )
    return key


def check_names(names: Collection[str]) -> None:
    """Check that factor names can all be arrays of one Zarr group.

    Raises:
        CheckpointError: For a name that is no safe path, is reserved by Zarr, or lies inside another one.
    """
    for name in names:
        for part in check_key(name).split("/"):
            if part.startswith("__") or part == "zarr.json" or not part.strip(".") or len(part.encode()) > 255:
                raise CheckpointError(f"factor name {name!r}: Zarr reserves the part {part!r}; rename the parameter")
    for first, second in zip(ordered := sorted(n + "/" for n in names), ordered[1:], strict=False):
        if second.startswith(first):
            raise CheckpointError(f"factor name {second[:-1]!r} lies inside the array {first[:-1]!r}; rename one")


def pack(matrices: np.ndarray, block: int = 64) -> np.ndarray:
    r"""Keep the lower triangles, row by row, of matrices that are symmetric up to rounding.

    Each kept entry is $(a_{ij} + a_{ji}) / 2$, which is $a_{ij}$ exactly where the matrix is symmetric. Memory beyond
    the result is `block` rows.

    Args:
        matrices: Shape `(..., d, d)`.
        block: Rows that are symmetrised at a time.

    Returns:
        Shape `(..., d (d + 1) / 2)`, same dtype.
    """
    *lead, rows, columns = matrices.shape
    assert rows == columns, f"a symmetric factor must be square, got {matrices.shape}"
    flat = matrices.reshape(prod(lead), rows, rows)
    packed = np.empty((len(flat), rows * (rows + 1) // 2), matrices.dtype)
    for matrix, out in zip(flat, packed, strict=True):
        for top in range(0, rows, block):
            end = min(top + block, rows)
            lower = matrix[top:end, :end]
            mean = np.ascontiguousarray(matrix[:end, top:end].T)
            mean -= lower
            assert np.abs(mean).max() <= 1e-2 * np.abs(lower).max(), "a factor declared symmetric is not"
            mean *= 0.5
            mean += lower
            for row in range(top, end):
                start = row * (row + 1) // 2
                out[start : start + row + 1] = mean[row - top, : row + 1]
    return packed.reshape(*lead, packed.shape[-1])


def unpack(packed: np.ndarray, block: int = 64) -> np.ndarray:
    """Rebuild the symmetric matrices, of shape `(..., d, d)`, from what `pack` returned, bit for bit."""
    *lead, size = packed.shape
    rows = int((8 * size + 1) ** 0.5) // 2
    assert rows * (rows + 1) // 2 == size, f"{size} numbers are not a triangle"
    full = np.empty((prod(lead), rows, rows), packed.dtype)
    for matrix, values in zip(full, packed.reshape(prod(lead), size), strict=True):
        for row in range(rows):
            start = row * (row + 1) // 2
            matrix[row, : row + 1] = values[start : start + row + 1]
        for top in range(0, rows, block):
            end = min(top + block, rows)
            matrix[:top, top:end] = matrix[top:end, :top].T
            corner = matrix[top:end, top:end]
            below = np.tril_indices(end - top, -1)
            corner.T[below] = corner[below]
    return full.reshape(*lead, rows, rows)
