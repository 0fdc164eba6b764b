"""Tar files in WebDataset's layout: an example is consecutive members `key.ext`, read by byte ranges."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from laplace_dist.config.settings import Config
from laplace_dist.data.choice import choose
from laplace_dist.data.files import File, Place
from laplace_dist.data.rows import Rows, Values
from laplace_dist.data.sparse import merge
from laplace_dist.data.tar_index import Index, chunks
from laplace_dist.errors import SettingsError

MOST = 32  # examples that are read at once


def _array(content: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays")
    return array


# By what a column's name ends with: how its bytes become a value, and what torch cannot join about that.
_READ: dict[str, tuple[Callable[[bytes], Any], str]] = {
    "npy": (_array, ""),
    "cls": (lambda content: np.int64(int(content)), ""),
    "txt": (lambda content: content.decode(), "strings"),
    "json": (json.loads, "JSON"),
}
_BYTES = "bytes"


class TarShards(Rows):
    """Examples of tar shards.

    A member `key.x.npy` is column `x`, `key.npy` is column `npy`: endings that say how bytes are read (`npy`, `cls`, `txt`,
    `json`) are taken off where something is left. Members of other kinds, such as `jpg`, are bytes.

    Args:
        place: Where the shards lie.
        files: In the order of their examples.
        config: The settings.
        split: Name of the split.
    """

    def __init__(self, place: Place, files: Sequence[File], config: Config, split: str) -> None:
        self._place, self._files = place, list(files)
        url = config.data_args.get("index")
        if url is not None and not isinstance(url, str):
            raise SettingsError("--data-args: index takes a path or URL, where the index of the shards is written once")
        self._index = Index(place, files, split, url)
        if not any(shard["examples"] for shard in self._index.shards):
            raise SettingsError(f"--data: {place.url!r} has an empty data set for split {split!r}")
        self._members = {_column(name): name for shard in self._index.shards for name in shard["columns"]}
        there = {column: _READ.get(_ending(name), (None, _BYTES))[1] for column, name in self._members.items()}
        choice = choose(config, there, f"split {split!r} of {place.url!r}")
        counts = [
            (number, n) for number, shard in enumerate(self._index.shards) for n in chunks(shard["examples"], MOST)
        ]
        self._owners = np.array([number for number, _ in counts], np.int64)
        known = json.dumps([[shard["name"], shard["size"], shard["sha256"]] for shard in self._index.shards])
        super().__init__([n for _, n in counts], choice, hashlib.sha256(known.encode()).hexdigest())

    def _load(self, chunk: int, names: Sequence[str]) -> Mapping[str, Values]:
        number = int(self._owners[chunk])
        file, table = self._files[number], self._index.table(number)
        self._place.check(file)
        first = self.start_of(chunk) - self._first(number)
        rows = slice(first, first + int(self._stops[chunk]) - self.start_of(chunk))
        places = {name: self._places(table, name, rows, file) for name in names}
        wanted = merge([(offset, offset + size) for found in places.values() for offset, size in found])
        parts = list(zip([start for start, _ in wanted], self._place.read(file, wanted), strict=True))
        found = {}
        for name in names:
            contents = [_cut(parts, offset, size) for offset, size in places[name]]
            found[name] = self._values(
                name, contents, [f"{key}.{self._members[name]}" for key in table.keys[rows]], file
            )
        return found

    def _places(self, table: Any, name: str, rows: slice, file: File) -> list[tuple[int, int]]:
        member = self._members[name]
        column = table.columns.index(member) if member in table.columns else None
        found = table.places[rows, column] if column is not None else np.full((rows.stop - rows.start, 2), -1)
        if (found < 0).any():
            row = int(np.flatnonzero(found[:, 0] < 0)[0])
            raise ValueError(f"row {rows.start + row} ({table.keys[rows][row]}) of {file.name} has no member .{member}")
        return [(int(offset), int(size)) for offset, size in found]

    def _values(self, name: str, contents: Sequence[bytes], members: Sequence[str], file: File) -> Values:
        read, obstacle = _READ.get(_ending(self._members[name]), (bytes, _BYTES))
        values = []
        for member, content in zip(members, contents, strict=True):
            try:
                values.append(read(content))
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(
                    f"member {member} of {file.name} cannot be read ({type(error).__name__}: {error})"
                ) from None
        same = not obstacle and len({(value.shape, value.dtype) for value in values}) == 1
        return np.stack(values) if same else values

    def where(self, index: int) -> str:
        """Return in a person's words where an example lies."""
        number = int(self._owners[self.chunk_of(index)])
        row = index - self._first(number)
        return f"row {row} ({self._index.table(number).keys[row]}) of {self._files[number].name}"

    def _first(self, number: int) -> int:
        """Return the first example of a shard."""
        return self.start_of(int(np.searchsorted(self._owners, number)))


def _column(member: str) -> str:
    """Return the column's name for what follows the first dot in a member's name."""
    stem, dot, ending = member.rpartition(".")
    return stem if dot and ending in _READ else member


def _ending(member: str) -> str:
    return member.rpartition(".")[2]


def _cut(parts: Sequence[tuple[int, bytes]], offset: int, size: int) -> bytes:
    return next(
        content[offset - at : offset - at + size]
        for at, content in parts
        if at <= offset and offset + size <= at + len(content)
    )
