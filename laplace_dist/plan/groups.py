"""Module groups: contiguous ranges of the vector of all factors, each of which is added up in a pass of its own over the data.

A worker holds the sums of one group at a time, so groups are what makes sums fit that one worker has no memory for. A group
begins and ends with a factor, or, within a symmetric one, with a block of rows that is added to at once. Where the vector is
cut changes no bit of any entry, so the groups belong to how a run is carried out and not to what its result is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from laplace.structures.specification import Factor, held_shape, row_cuts
from laplace_dist.plan.parts import Part, Place, places, triangle
from laplace_dist.plan.segments import Segment


@dataclass(frozen=True)
class Group:
    """A contiguous range of the vector.

    Attributes:
        number: Its place among the groups.
        places: Where what it holds lies in the vector, in order.
    """

    number: int
    places: tuple[Place, ...]

    @property
    def start(self) -> int:
        """Its first entry."""
        return self.places[0].start

    @property
    def stop(self) -> int:
        """One past its last entry."""
        return self.places[-1].stop

    @property
    def rows(self) -> dict[str, tuple[int, int]]:
        """What it holds: the rows of each of its factors, as the core library's sums take them."""
        return {place.name: place.rows for place in self.places}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes in which it is held."""
        return {place.name: held_shape(Factor(place.shape, place.symmetric), *place.rows) for place in self.places}

    @property
    def nbytes(self) -> int:
        """What its sums take in a worker."""
        return 8 * sum(map(prod, self.shapes.values()))

    def overlap(self, part: Part) -> tuple[int, int] | None:
        """Return first and last entry, plus one, of what it has of a part; None where that is nothing."""
        start, stop = max(part.start, self.start), min(part.stop, self.stop)
        return (start, stop) if start < stop else None


@dataclass(frozen=True, order=True)
class Unit(Segment):
    """One group of the sums of one segment, which a task accumulates and commits as a partial.

    Attributes:
        group: Number of the group.
    """

    group: int = 0


def units(segments: Sequence[Segment], groups: int) -> tuple[Segment, ...]:
    """Return the units of work, pass by pass over the segments; of a single group they are the segments."""
    if groups == 1:
        return tuple(segments)
    return tuple(
        Unit(f"{segment.id}-g{group}", segment.start, segment.stop, group)
        for group in range(groups)
        for segment in segments
    )


def plan_groups(spec: Mapping[str, Any], count: int) -> tuple[Group, ...]:
    """Cut the vector of all factors into groups, so that the largest of them takes as little memory as can be.

    Args:
        spec: The plan's specification of the sums.
        count: How many; fewer where there are not so many pieces.
    """
    pieces = [*_pieces(spec)]
    if (count := min(count, len(pieces))) < 2:
        return (Group(0, tuple(places(spec))),)
    low, high = 0, 8 * sum(prod(held_shape(Factor(p.shape, p.symmetric), *p.rows)) for p in pieces) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(pieces, middle, 1)) <= count and _fits(pieces, middle) else (middle, high)
    return tuple(_cut(pieces, high, count))


def fewest(spec: Mapping[str, Any], nbytes: int) -> int | None:
    """Return how few groups there can be none of whose sums take more than so many bytes; None where no number does.

    Args:
        spec: The plan's specification of the sums.
        nbytes: That a worker has for them.
    """
    pieces = [*_pieces(spec)]
    return max(1, len(_cut(pieces, nbytes, 1))) if _fits(pieces, nbytes) else None


def most(spec: Mapping[str, Any]) -> int:
    """Return how many groups there can be."""
    return max(1, sum(1 for _ in _pieces(spec)))


def _pieces(spec: Mapping[str, Any]) -> Iterator[Place]:
    """Yield the smallest pieces that a group may begin or end with, in order."""
    for place in places(spec):
        cuts = row_cuts(Factor(place.shape, place.symmetric))
        for first, last in zip(cuts, cuts[1:], strict=False):
            yield _of_rows(place, first, last)


def _of_rows(place: Place, first: int, last: int) -> Place:
    """Return where some rows of a factor lie, given where any others do."""
    if (first, last) == place.rows:
        return place
    begin = place.start - triangle(place.rows[0])
    return Place(place.name, place.shape, True, begin + triangle(first), begin + triangle(last), (first, last))


def _cut(pieces: Sequence[Place], nbytes: int, least: int) -> list[Group]:
    """Fill groups one after the other up to so many bytes, but for a piece that takes more; there are at least `least`."""
    found: list[list[Place]] = [[]]
    held = 0
    for number, piece in enumerate(pieces):
        joined = _joined(found[-1], piece)
        size = held - _size(found[-1][-1:]) * (len(joined) == len(found[-1])) + _size(joined[-1:])
        if found[-1] and (size > nbytes or len(pieces) - number <= least - len(found)):
            found.append([piece])
            held = _size([piece])
        else:
            found[-1], held = joined, size
    return [Group(number, tuple(own)) for number, own in enumerate(found)]


def _joined(own: list[Place], piece: Place) -> list[Place]:
    """Return the places of a group with another piece: rows of one factor that follow one another are one place."""
    if own and own[-1].name == piece.name:
        return [*own[:-1], _of_rows(own[-1], own[-1].rows[0], piece.rows[1])]
    return [*own, piece]


def _fits(pieces: Sequence[Place], nbytes: int) -> bool:
    return all(_size([piece]) <= nbytes for piece in pieces)


def _size(some: Sequence[Place]) -> int:
    return 8 * sum(prod(held_shape(Factor(place.shape, place.symmetric), *place.rows)) for place in some)
