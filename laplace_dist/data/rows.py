"""A split that is read in chunks, such as row groups: examples and batches, each chunk read once while they are in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from laplace_dist.data.choice import Choice
from laplace_dist.errors import SettingsError

Values = np.ndarray | list  # of one column: one array for all rows where their shapes agree, else a list
_CHUNKS, _SAMPLES = 8, 64  # of a fingerprint


class Rows(ABC):
    """A map-style data set whose rows lie in chunks.

    An example is a pair or a mapping of columns, as the choice says; a slice is a batch of them. Both are copies: what is
    done to them does not reach the chunk that is kept, which is the last one that was read.

    Args:
        counts: Rows of each chunk, each at least one.
        choice: Which columns make an example.
        identity: Digest of what is known of the files without reading all of them: names, sizes, footers.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, choice: Choice, identity: str) -> None:
        self.choice, self.identity = choice, identity
        self._stops = np.cumsum(np.asarray(counts, np.int64))
        self._kept: tuple[int, Mapping[str, Values]] | None = None

    @abstractmethod
    def _load(self, chunk: int, names: Sequence[str]) -> Mapping[str, Values]:
        """Return the values of columns in a chunk.

        Raises:
            OSError, ValueError: Naming the file and, where it is about one, the row.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Return in a person's words where an example lies, such as `row 3 of train/a.parquet`."""

    # -------------------------------------------------------------- chunks

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def chunk_of(self, index: int) -> int:
        """Return the chunk that an example lies in."""
        return int(np.searchsorted(self._stops, index, "right"))

    def start_of(self, chunk: int) -> int:
        """Return the first example of a chunk."""
        return int(self._stops[chunk - 1]) if chunk else 0

    def sampled(self) -> list[int]:
        """Return the examples that stand for all: up to 64, first and last included, from few chunks, which are read whole."""
        n = len(self)
        if n <= _SAMPLES:
            return list(range(n))
        found = set()
        for chunk in _spread(0, len(self._stops), _CHUNKS):
            found |= set(_spread(self.start_of(chunk), int(self._stops[chunk]), _SAMPLES // _CHUNKS))
        return sorted(found)

    def _column_parts(self, start: int, stop: int) -> dict[str, list[Values]]:
        """Return each chosen column of a range, in one part for each chunk; the last chunk is kept."""
        parts: dict[str, list[Values]] = {name: [] for name in self.choice.names}
        for chunk in range(self.chunk_of(start), self.chunk_of(stop - 1) + 1):
            if self._kept is None or self._kept[0] != chunk:
                self._kept = None
                self._kept = chunk, self._load(chunk, self.choice.names)
            first = self.start_of(chunk)
            for name, values in self._kept[1].items():
                parts[name].append(values[max(start - first, 0) : stop - first])
        return parts

    # -------------------------------------------------------------- examples and batches

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1 and start < stop, f"{index}: a range of examples, in order"
            columns = self._column_parts(start, stop)
            return self.choice.example({name: self._joined(name, columns[name], start) for name in columns})
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.choice.example(
            {name: _tensor(part[0][0]) for name, part in self._column_parts(index, index + 1).items()}
        )

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return examples, for a `--collate` that joins them."""
        return [self[index] for index in indices]

    @property
    def group(self) -> list[Any] | None:
        """The group of each example, which reports show apart, or None where the data have none.

        Raises:
            SettingsError: One cannot be read or is null; naming the row.
        """
        name = self.choice.group
        if name is None:
            return None
        try:
            return [value for chunk in range(len(self._stops)) for value in _plain(self._load(chunk, [name])[name])]
        except (OSError, ValueError) as error:
            raise SettingsError(f"--data: {error}") from error

    def column(self, name: str, start: int, stop: int) -> list[Any] | None:
        """Return the values of the column with the examples' weights in a range of them; None where it is another one.

        Raises:
            OSError, ValueError: One cannot be read or is null; naming the row.
        """
        if name != self.choice.weight:
            return None
        found: list[Any] = []
        for chunk in range(self.chunk_of(start), self.chunk_of(stop - 1) + 1):
            first = self.start_of(chunk)
            found += _plain(self._load(chunk, [name])[name])[max(start - first, 0) : stop - first]
        return found

    def _joined(self, name: str, parts: list[Values], start: int) -> Any:
        """Join the parts of a column to one tensor, or to a list where they are no numbers.

        Raises:
            ValueError: Rows have different shapes; naming two of them.
        """
        if all(isinstance(part, np.ndarray) for part in parts) and len({part.shape[1:] for part in parts}) == 1:
            return _tensor(np.concatenate(parts) if len(parts) > 1 else parts[0])
        rows = [row for part in parts for row in part]
        if not any(isinstance(row, np.ndarray) for row in rows):
            return rows
        other = next((i for i, row in enumerate(rows) if np.shape(row) != np.shape(rows[0])), None)
        if other is None:
            return _tensor(np.stack(rows))
        raise ValueError(
            f"column {name!r} has shape {np.shape(rows[0])} in {self.where(start)} and {np.shape(rows[other])} in "
            f"{self.where(start + other)}; give all rows one shape (pad, crop or resize), or join them with --collate"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _spread(start: int, stop: int, count: int) -> list[int]:
    """Return up to `count` evenly spaced numbers of a range, first and last included."""
    count = min(stop - start, count)
    return sorted({start + i * (stop - 1 - start) // max(count - 1, 1) for i in range(count)})


def _tensor(value: Any) -> Any:
    """Return a copy of numbers as a tensor, in this machine's byte order; other values as they are."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    array = np.array(value)
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _plain(values: Values) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
