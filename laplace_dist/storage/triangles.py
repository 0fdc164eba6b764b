"""Symmetric matrices kept as one triangle."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import numpy as np

from laplace_dist.plan.parts import triangle

_BLOCK = 64  # rows that are symmetrised at a time


def pack(matrix: np.ndarray, start: int, stop: int, packed: np.ndarray | None = None) -> np.ndarray:
    r"""Return entries `start` to `stop` of the lower triangle, row by row, of a matrix that is symmetric up to rounding.

    Each entry is $(a_{ij} + a_{ji}) / 2$, which is $a_{ij}$ exactly where the matrix is symmetric. Memory beyond
    the result is a few rows.

    Args:
        matrix: Shape `(d, d)`, or its last rows alone, `(d - a, d)`: of the entries left of column `a` there is but one.
        start: First entry, counted along the packed triangle of the whole.
        stop: One past the last entry, at most `d (d + 1) / 2`.
        packed: Of shape `(stop - start,)`, where they are put; a new array of the matrix's dtype if not given.

    Returns:
        `packed`.
    """
    rows, size = matrix.shape
    above = size - rows
    assert above >= 0 and triangle(above) <= start, f"a symmetric factor must be square, got {matrix.shape}"
    packed = np.empty(stop - start, matrix.dtype) if packed is None else packed
    first = _row(start) // _BLOCK * _BLOCK
    for top in range(max(first, above), min(size, _row(max(stop - 1, 0)) + 1), _BLOCK):
        end = min(top + _BLOCK, size)
        lower = matrix[top - above : end - above, :end]
        mean = _symmetrised(lower, matrix[: end - above, top:end].T, above)
        for row, at, left, right in _pieces(top, end, start, stop):
            packed[at + left : at + right] = mean[row - top, left:right]
    return packed


def _symmetrised(lower: np.ndarray, upper: np.ndarray, above: int) -> np.ndarray:
    """Return the mean of some rows and of what mirrors them, which is there from column `above` on."""
    if np.array_equal(lower[:, above:], upper):
        return lower
    mean = np.empty(lower.shape, lower.dtype)
    mean[:, :above], mean[:, above:] = lower[:, :above], upper
    mean -= lower
    assert np.abs(mean).max() <= 1e-2 * np.abs(lower).max(), "a factor declared symmetric is not"
    mean *= 0.5
    mean += lower
    return mean


def unpack(matrix: np.ndarray, start: int, packed: np.ndarray) -> None:
    """Put entries of a packed triangle, the first of them number `start`, into the lower triangle of a matrix."""
    stop = start + len(packed)
    for row, at, left, right in _pieces(_row(start), len(matrix), start, stop):
        matrix[row, left:right] = packed[at + left : at + right]


def mirror(matrix: np.ndarray) -> None:
    """Copy the lower triangle of a square matrix to the upper one, in place."""
    size = len(matrix)
    for top in range(0, size, _BLOCK):
        end = min(top + _BLOCK, size)
        matrix[:top, top:end] = matrix[top:end, :top].T
        corner = matrix[top:end, top:end]
        below = np.tril_indices(end - top, -1)
        corner.T[below] = corner[below]


def _row(entry: int) -> int:
    """Return the row of the triangle in which a packed entry lies."""
    return (isqrt(8 * entry + 1) - 1) // 2


def _pieces(top: int, end: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield `(row, at, left, right)`: which columns of the rows `top` to `end` are entries `start` to `stop`.

    Column `left` of the row is number `at + left` of these entries.
    """
    at = triangle(top) - start
    for row in range(top, end):
        left, right = max(-at, 0), min(stop - start - at, row + 1)
        if right <= 0:
            return
        if left < right:
            yield row, at, left, right
        at += row + 1
