"""Parts: blocks of rows of a sum, the unit of reduction, cut from all its factors laid end to end.

A sum is elementwise, so where it is cut changes no bit. Small factors share a part, which saves requests; large ones are cut,
which bounds a task's memory and shares the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

PART_ENTRIES = 4 * 2**20  # 32 MiB of float64: a few seconds of reading, and a task holds two


@dataclass(frozen=True)
class Place:
    """Where a factor lies in the vector of all factors, a symmetric one as its lower triangle, row by row.

    Attributes:
        name: Of the factor.
        shape: Of the factor; its last two axes are those of a symmetric one.
        symmetric: Whether it is.
        start: Its first entry.
        stop: One past its last entry.
        rows: The rows that lie there, first and one past the last: all, or some of a symmetric factor.
    """

    name: str
    shape: tuple[int, ...]
    symmetric: bool
    start: int
    stop: int
    rows: tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A contiguous range of the vector, `start <= i < stop`."""

    id: str
    start: int
    stop: int


def triangle(rows: int) -> int:
    """Return how many entries the lower triangle of a square matrix with so many rows has."""
    return rows * (rows + 1) // 2


def places(spec: Mapping[str, Any]) -> list[Place]:
    """Return where every factor of a specification lies, in its order, one behind the other."""
    found, start = [], 0
    for name, factor in spec["factors"].items():
        shape = tuple(factor["shape"])
        size = prod(shape[:-2]) * triangle(shape[-1]) if factor["symmetric"] else prod(shape)
        found.append(Place(name, shape, factor["symmetric"], start, start + size, (0, shape[0] if shape else 1)))
        start += size
    return found


def plan_parts(spec: Mapping[str, Any], entries: int) -> list[Part]:
    """Cut the vector of all factors into parts.

    Args:
        spec: The plan's specification of the sums.
        entries: Of a part; the last one may have less.
    """
    end = places(spec)[-1].stop if spec["factors"] else 0
    return [Part(f"{i:05d}", start, min(start + entries, end)) for i, start in enumerate(range(0, end, entries))]
