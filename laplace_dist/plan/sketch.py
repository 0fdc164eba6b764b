"""Which examples a window holds, in bounded room: the digests of all of them, or of a share that their own digests choose.

An example is kept if its digest is below a limit, which depends on the number of examples alone. So of two windows the same
examples are kept wherever they lie in them, and what the windows have in common is found by comparing a few thousand digests.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from laplace.drift.duplicates import Common, common

KEPT = 4096  # digests of a window: all, where it has no more examples, else about so many,
LEAST = 512  # but of no fewer than one example in so many, so that a small copy from a large window is found
ALL = 2**64
SURE = 1e-6  # probability under which what two windows have in common is not taken for chance


def limit_of(n_examples: int) -> int:
    """Return below which value the digests of a window of so many examples are kept."""
    return min(ALL, max(KEPT * ALL // n_examples, ALL // LEAST))


@dataclass(frozen=True)
class Sketch:
    """The digests of a window's examples that are below a limit.

    Attributes:
        limit: Kept are those below it, at most 2^64.
        digests: Different ones, ascending, ``(kept,)``, uint64.
        counts: How many examples have each of them, ``(kept,)``.
    """

    limit: int
    digests: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, limit: int, digests: np.ndarray) -> Self:
        """Return the sketch of examples with these digests, ``(examples,)``, uint64."""
        return cls(limit, *np.unique(_below(digests, limit), return_counts=True))

    @classmethod
    def merged(cls, sketches: Sequence[Sketch]) -> Self:
        """Return the sketch of all examples of several sketches with one limit."""
        joined = np.concatenate([sketch.digests for sketch in sketches])
        digests, place = np.unique(joined, return_inverse=True)
        counts = np.zeros(len(digests), np.int64)
        np.add.at(counts, place, np.concatenate([sketch.counts for sketch in sketches]))
        return cls(sketches[0].limit, digests, counts)

    def below(self, limit: int) -> Sketch:
        """Return the sketch with a lower limit."""
        kept = len(_below(self.digests, limit))
        return Sketch(min(limit, self.limit), self.digests[:kept], self.counts[:kept])

    @property
    def n(self) -> int:
        """How many examples were kept."""
        return int(self.counts.sum())

    def to_values(self) -> dict[str, Any]:
        """Return it as plain values: digests as base64 of little-endian integers, and those counts that are not 1."""
        many = np.flatnonzero(self.counts != 1)
        content = base64.b64encode(self.digests.astype("<u8").tobytes()).decode()
        repeats = [[int(place), int(self.counts[place])] for place in many]
        return {"limit": f"{self.limit:x}", "digests": content, "repeats": repeats}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_values` gave these values.

        Raises:
            ValueError: Nothing has given them.
        """
        digests = np.frombuffer(base64.b64decode(values["digests"], validate=True), "<u8").astype(np.uint64)
        counts = np.ones(len(digests), np.int64)
        for place, count in values["repeats"]:
            if not 0 <= place < len(digests) or count < 2:
                raise ValueError("repeats of digests that are not there")
            counts[place] = count
        found = cls(int(values["limit"], 16), digests, counts)
        if not 0 < found.limit <= ALL or len(_below(digests, found.limit)) < len(digests) or _unsorted(digests):
            raise ValueError("digests that are not ascending and below the limit")
        return found


def shared(one: Sketch, other: Sketch) -> tuple[Common, int]:
    """Return what two windows have in common among the examples that both have kept, and the size of the smaller sample."""
    limit = min(one.limit, other.limit)
    first, second = one.below(limit), other.below(limit)
    digests = np.union1d(first.digests, second.digests)
    times = [np.zeros(len(digests), np.int64) for _ in range(2)]
    for counts, sketch in zip(times, (first, second), strict=True):
        counts[np.searchsorted(digests, sketch.digests)] = sketch.counts
    sizes = first.n, second.n
    return (common(*times, sizes) if min(sizes) else Common(0, 0, 0.0, 1.0)), min(sizes)


class ExampleDigests:
    """Gathers the digests of the examples of batches, as far as batches can be taken apart.

    Args:
        limit: See `Sketch`.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._found, self._whole = limit, [np.empty(0, np.uint64)], True

    def add(self, x: Any, y: Tensor) -> None:
        """Take in a batch of inputs, in the form that the core library takes, and targets ``(batch, …)``."""
        rows = _rows(x, y) if self._whole else None
        self._whole = rows is not None
        if rows is not None:
            self._found.append(_below(_digests(*rows), self._limit))

    @property
    def sketch(self) -> Sketch | None:
        """The sketch; None where an example is no row of the batches that it is in."""
        return Sketch.of(self._limit, np.concatenate(self._found)) if self._whole else None


def _digests(kind: bytes, rows: np.ndarray) -> np.ndarray:
    """Return the first 8 bytes of the sha256 of every row, ``(examples,)``, uint64."""
    start, content, width = hashlib.sha256(kind), memoryview(rows.tobytes()), rows.shape[1]
    found = []
    for place in range(0, len(rows) * width, width):
        own = start.copy()
        own.update(content[place : place + width])
        found.append(own.digest()[:8])
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def _rows(x: Any, y: Tensor) -> tuple[bytes, np.ndarray] | None:
    """Return what the rows of a batch are, and their bytes, ``(batch, bytes)``; None where not everything has a row of each."""
    items = x if isinstance(x, Mapping) else {"": x}
    leaves = [*((str(key), items[key]) for key in sorted(items, key=str)), ("targets", y)]
    if not y.ndim or not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(y) for _, leaf in leaves):
        return None
    kinds = [f"{name} {leaf.dtype} {list(leaf.shape[1:])}" for name, leaf in leaves]
    rows = np.concatenate([_bytes_of(leaf) for _, leaf in leaves], 1)
    return ("; ".join(kinds).encode(), rows) if rows.shape[1] else None


def _bytes_of(leaf: Tensor) -> np.ndarray:
    flat = leaf.detach().cpu().contiguous().reshape(len(leaf), -1)
    return flat.view(torch.uint8).numpy() if flat.shape[1] else np.empty((len(leaf), 0), np.uint8)


def _below(digests: np.ndarray, limit: int) -> np.ndarray:
    return digests if limit >= ALL else digests[digests < np.uint64(limit)]


def _unsorted(digests: np.ndarray) -> bool:
    return bool((digests[1:] <= digests[:-1]).any())


def merged(values: Iterable[Mapping[str, Any] | None]) -> Sketch | None:
    """Return the sketch of a window from the values of its segments' sketches; None where one has none."""
    found = [None if value is None else Sketch.from_values(value) for value in values]
    return None if not found or None in found else Sketch.merged(found)
