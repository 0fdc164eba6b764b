"""A file of which some byte ranges are in memory, for readers that seek: what is not there is read when it is asked for."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from laplace_dist.data.files import File, Place

_GAP = 2**16  # bytes between two ranges below which reading them too is cheaper than another request


class Sparse(io.RawIOBase):
    """The file.

    Args:
        place: Where it lies.
        file: Which one.
        parts: What is known of it, as `(start, content)`.
    """

    def __init__(self, place: Place, file: File, parts: Iterable[tuple[int, bytes]]) -> None:
        self._place, self._file, self._at = place, file, 0
        self._parts = list(parts)

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Read ranges ahead, those that lie close together as one."""
        merged = merge(ranges)
        self._parts += zip([start for start, _ in merged], self._place.read(self._file, merged), strict=True)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read anywhere."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes.

        Raises:
            OSError: They cannot be read; naming the file.
        """
        start, stop = self._at, self._file.size if count < 0 else min(self._at + count, self._file.size)
        self._at = max(stop, start)
        if start >= stop:
            return b""
        for first, content in self._parts:
            if first <= start and stop <= first + len(content):
                return content[start - first : stop - first]
        return self._place.read(self._file, [(start, stop)])[0]


def merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in order, those that overlap or lie close together as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1] + _GAP:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found
