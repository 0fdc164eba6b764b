"""Splits of Parquet and Arrow files: what they have in common."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from laplace_dist.config.settings import Config
from laplace_dist.data.choice import choose
from laplace_dist.data.columns import check_same, obstacles, values_of
from laplace_dist.data.file_errors import FileError
from laplace_dist.data.files import File, Place
from laplace_dist.data.rows import Rows, Values
from laplace_dist.errors import SettingsError

TAIL = 2**16  # bytes at the end of a file that are read to find its footer; a longer one costs a second request


@dataclass(frozen=True)
class Described:
    """What the footer of a file says.

    Attributes:
        schema: Its columns.
        counts: Rows of each chunk.
        footer: Length of the footer in bytes.
        sha256: Digest of the footer.
    """

    schema: pa.Schema
    counts: list[int]
    footer: int
    sha256: bytes


class TableFiles(Rows):
    """Rows of files whose footers say where chunks of rows lie.

    Of each file a few numbers are kept; its footer is read again, and compared, when its first chunk is needed.

    Args:
        place: Where the files lie.
        files: In the order of their rows.
        config: The settings.
        split: Name of the split.
    """

    def __init__(self, place: Place, files: Sequence[File], config: Config, split: str) -> None:
        self._place, self._files = place, list(files)
        counts, owners, footers, digest = [], [], [], hashlib.sha256()
        for number, (file, found) in enumerate(self._described()):
            if not number:
                first = found.schema
                choice = choose(config, obstacles(first), f"split {split!r} of {place.url!r}")
            check_same(first, found.schema, choice.used, (files[0].name, file.name))
            digest.update(f"{file.name} {file.size} ".encode() + found.sha256)
            counts += found.counts
            owners += [number] * len(found.counts)
            footers.append(found.footer)
        there = np.asarray(counts, np.int64) > 0
        self._owners = np.asarray(owners, np.int64)[there]
        self._footers = np.asarray(footers, np.int64)
        self._local = np.concatenate([np.arange(n) for n in np.bincount(owners, minlength=1)])[there]
        self._digests: dict[int, bytes] = {}
        self._current: tuple[int, Any] | None = None
        super().__init__(np.asarray(counts, np.int64)[there], choice, digest.hexdigest())

    @abstractmethod
    def _describe(self, file: File, tail: bytes) -> Described:
        """Return what the footer of a file says, given its last bytes; errors are raised as they come."""

    @abstractmethod
    def _reader(self, file: File, footer: bytes) -> Any:
        """Return what reads the chunks of a file."""

    @abstractmethod
    def _table(self, reader: Any, chunk: int, names: Sequence[str]) -> pa.Table:
        """Return columns of a chunk, which is numbered within its file."""

    def _described(self) -> Iterator[tuple[File, Described]]:
        for file, tail in self._place.ends(self._files, TAIL):
            try:
                yield file, self._describe(file, tail)
            except (pa.ArrowException, OSError, ValueError) as error:
                if isinstance(error, SettingsError):
                    raise
                raise SettingsError(
                    f"--data: {file.name} is damaged or of another format ({_line(error)}); restore it"
                ) from None

    def _load(self, chunk: int, names: Sequence[str]) -> Mapping[str, Values]:
        number = int(self._owners[chunk])
        file = self._files[number]
        first = self.start_of(chunk) - self.start_of(int(np.searchsorted(self._owners, number)))
        try:
            table = self._table(self._opened(number), int(self._local[chunk]), names)
        except FileError:
            raise
        except (
            pa.ArrowException,
            OSError,
            ValueError,
        ) as error:  # of bytes that pyarrow cannot make sense of
            raise FileError(
                f"{file.name} is damaged in the chunk that begins with row {first} ({_line(error)}); restore it"
            ) from None
        if len(table) != int(self._stops[chunk]) - self.start_of(chunk):
            raise FileError(
                f"{file.name} has {len(table)} rows in the chunk that begins with row {first}, its footer says otherwise"
            )
        return values_of(table, names, lambda row: f"row {first + row} of {file.name}")

    def where(self, index: int) -> str:
        """Return in a person's words where an example lies."""
        number = int(self._owners[self.chunk_of(index)])
        first = self.start_of(int(np.searchsorted(self._owners, number)))
        return f"row {index - first} of {self._files[number].name}"

    def _opened(self, number: int) -> Any:
        """Return the reader of a file, which is checked to be the one it was; that of the last file is kept."""
        file = self._files[number]
        self._place.check(file)
        if self._current is None or self._current[0] != number:
            (footer,) = self._place.read(file, [(file.size - int(self._footers[number]), file.size)])
            self._current = number, self._reader(file, footer)
        return self._current[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_current": None}


def tail_of(place: Place, file: File, tail: bytes, footer: int) -> bytes:
    """Return the last bytes of a file that hold its footer.

    Raises:
        ValueError: It is longer than the file.
    """
    if not 0 < footer <= file.size:
        raise ValueError(f"its last bytes say that {footer} bytes describe it, and it has {file.size}")
    return tail[len(tail) - footer :] if footer <= len(tail) else place.read(file, [(file.size - footer, file.size)])[0]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
