"""The factors of a sum as one vector, and back: see `plan.parts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from laplace_dist.plan.parts import Place
from laplace_dist.storage.triangles import mirror, pack, triangle, unpack


@dataclass(frozen=True)
class Vector:
    """Factors laid end to end without a copy; what is asked for is packed on the way.

    Attributes:
        places: Where the factors lie, or the rows of them that are there.
        arrays: The factors by name; those that are asked for.
    """

    places: Sequence[Place]
    arrays: Mapping[str, np.ndarray]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the entries from `start` to `stop`, float64."""
        found = np.empty(stop - start, np.float64)
        for place, left, right in overlaps(self.places, start, stop):
            at = place.start + left - start
            _read(place, self.arrays[place.name], left, right, found[at : at + right - left])
        return found

    def part(self, start: int, stop: int) -> Slice:
        """Return a range as something that a store can write."""
        return Slice(self, start, stop)


@dataclass(frozen=True)
class Slice:
    """A range of a vector that looks like an array of one dimension, and is packed piece by piece as it is sliced."""

    vector: Vector
    start: int
    stop: int
    dtype = np.dtype(np.float64)
    ndim = 1

    @property
    def shape(self) -> tuple[int]:
        """Number of entries."""
        return (self.stop - self.start,)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * (self.stop - self.start)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.vector.read(self.start + rows.start, self.start + rows.stop)


def overlaps(places: Sequence[Place], start: int, stop: int) -> Iterator[tuple[Place, int, int]]:
    """Yield `(place, left, right)`: which entries, counted in the factor, lie in a range of the vector."""
    for place in places:
        left, right = max(start, place.start), min(stop, place.stop)
        if left < right:
            yield place, left - place.start, right - place.start


def write(places: Sequence[Place], arrays: Mapping[str, np.ndarray], start: int, values: np.ndarray) -> None:
    """Put a range of the vector into the factors; of symmetric ones into the lower triangle, see `complete`.

    Args:
        places: Where the factors lie.
        arrays: The factors by name, written to; a factor that is not there is left out.
        start: First entry of the range.
        values: The range.
    """
    for place, left, right in overlaps(places, start, start + len(values)):
        if place.name not in arrays:
            continue
        part = values[place.start + left - start : place.start + right - start]
        if not place.symmetric:
            arrays[place.name].reshape(-1)[left:right] = part
            continue
        for matrix, first, last, at in _pieces(place, arrays[place.name], left, right):
            unpack(matrix, first, part[at : at + last - first])


def complete(places: Sequence[Place], arrays: Mapping[str, np.ndarray]) -> None:
    """Copy the lower triangles of the symmetric factors to the upper ones, in place."""
    for place in places:
        if place.symmetric and place.name in arrays:
            for matrix in _matrices(place, arrays[place.name]):
                mirror(matrix)


def _read(place: Place, array: np.ndarray, left: int, right: int, found: np.ndarray) -> None:
    """Put a range of a factor's entries into an array of its length."""
    above = triangle(place.rows[0]) if place.symmetric else 0  # entries of rows that are not held
    if not place.symmetric:
        found[:] = np.ascontiguousarray(array).reshape(-1)[left:right]
    elif above:
        pack(array, above + left, above + right, found)
    else:
        for matrix, first, last, at in _pieces(place, array, left, right):
            pack(matrix, first, last, found[at : at + last - first])


def _pieces(place: Place, array: np.ndarray, left: int, right: int) -> Iterator[tuple[np.ndarray, int, int, int]]:
    """Yield `(matrix, first, last, at)` for a range of a symmetric factor's entries: which of its matrix, and from where on."""
    size = triangle(place.shape[-1])
    for number, matrix in enumerate(_matrices(place, array)):
        first, last = max(left - number * size, 0), min(right - number * size, size)
        if first < last:
            yield matrix, first, last, number * size + first - left


def _matrices(place: Place, array: np.ndarray) -> np.ndarray:
    return array.reshape(prod(place.shape[:-2]), *array.shape[-2:])
