"""Where the members of tar shards lie: found by reading a shard's headers once, and kept for later jobs if asked for."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laplace_dist.data.files import File, Place
from laplace_dist.errors import SettingsError

_FORMAT = 1


@dataclass(frozen=True)
class Table:
    """The examples of one shard.

    Attributes:
        keys: Of the examples: the names of their members up to the first dot.
        columns: What follows the first dot, for all that occur.
        places: Offset and size of each member, of shape (examples, columns, 2); -1 where an example has no such member.
    """

    keys: list[str]
    columns: list[str]
    places: np.ndarray

    def to_bytes(self) -> bytes:
        """Return the table as the bytes of a file."""
        content = io.BytesIO()
        names = np.frombuffer(json.dumps([self.keys, self.columns]).encode(), np.uint8)
        np.savez_compressed(content, names=names, places=self.places)
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Table:
        """Return the table that `to_bytes` gave these bytes."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            keys, columns = json.loads(arrays["names"].tobytes())
            return cls(keys, columns, arrays["places"])

    @property
    def sha256(self) -> str:
        """Digest of what it says."""
        names = json.dumps([self.keys, self.columns]).encode()
        return hashlib.sha256(names + self.places.tobytes()).hexdigest()


def scan(place: Place, file: File) -> Table:
    """Return the table of a shard, reading its headers.

    Folders, members whose names have no dot, and those with two underscores at both ends are no part of an example, as in
    WebDataset.

    Raises:
        SettingsError: It is no plain tar file, is cut off, or has an example in two places; naming the file.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    last = None
    try:
        with place.open(file) as content, tarfile.open(fileobj=content, mode="r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, column = name.partition(".")
                if not member.isfile() or not stem or not dot or (name.startswith("__") and name.endswith("__")):
                    _check_plain(member)
                    continue
                key = folder + slash + stem
                if key != last and key in rows:
                    raise ValueError(f"the members of example {key!r} do not follow each other")
                if column in rows.setdefault(key, {}):
                    raise ValueError(f"there are two members {member.name!r}")
                if member.offset_data + member.size > file.size:
                    raise ValueError(f"it ends within member {member.name!r}")
                rows[key][column] = member.offset_data, member.size
                last = key
            _check_end(content, tar.offset)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise SettingsError(
            f"--data: {file.name} is no whole, plain tar file ({type(error).__name__}: {error}); restore it"
        ) from None
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    absent = -1, -1
    places = np.array([[row.get(column, absent) for column in columns] for row in rows.values()], np.int64)
    return Table(list(rows), columns, places.reshape(len(rows), len(columns), 2))


def _check_plain(member: tarfile.TarInfo) -> None:
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"member {member.name!r} is a link or the like")


def _check_end(content: Any, offset: int) -> None:
    """Refuse a tar file that does not end in blocks of zeros: cut off, or with a damaged header, where `tarfile` just ends."""
    content.seek(offset)
    length = 0
    while block := content.read(2**20):
        length += len(block)
        if block.count(0) != len(block):
            raise ValueError(f"after byte {offset} there is neither a member nor the end")
    if not length or length % tarfile.BLOCKSIZE:
        raise ValueError("its end is cut off")


class Index:
    """The tables of shards, in memory, or under a path or URL where they are written once.

    Args:
        place: Where the shards lie.
        files: The shards.
        split: Their split.
        url: Where the tables are kept; None keeps them in memory.
    """

    def __init__(self, place: Place, files: Sequence[File], split: str, url: str | None) -> None:
        self._files, self._split = list(files), split
        self._kept = Place(url, place.options) if url is not None else None
        self._tables: dict[int, Table] = {}
        known = self._read_manifest()
        self.shards = [self._shard(place, number, known.get(file.name)) for number, file in enumerate(files)]
        if self._kept is not None and [shard for shard in self.shards if known.get(shard["name"]) != shard]:
            self._kept.put(self._manifest, json.dumps({"format": _FORMAT, "shards": self.shards}).encode())

    def table(self, number: int) -> Table:
        """Return the table of a shard; of those that are kept elsewhere only the last one stays in memory.

        Raises:
            OSError: It cannot be read or is damaged; naming the file.
        """
        if number not in self._tables:
            shard = self.shards[number]
            found = self._read_table(shard)
            if found is None:
                raise OSError(
                    f"the index {self._kept.url}/{_file(shard)} is missing or damaged; delete {self._manifest} "
                    "beside it, so that it is written again"
                )
            self._tables = {number: found}
        return self._tables[number]

    def _shard(self, place: Place, number: int, known: dict[str, Any] | None) -> dict[str, Any]:
        file = self._files[number]
        if known is not None and (known["size"], known["version"]) == (file.size, file.version):
            return known
        table = scan(place, file)
        shard = {"name": file.name, "size": file.size, "version": file.version, "examples": len(table.keys)}
        shard |= {"columns": table.columns, "sha256": table.sha256}
        if self._kept is None:
            self._tables[number] = table
        else:
            self._kept.put(_file(shard), table.to_bytes())
        return shard

    @property
    def _manifest(self) -> str:
        return f"{self._split}.tar-index.json"

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        if self._kept is None:
            return {}
        content = self._kept.content(self._manifest)
        if content is None:
            return {}
        try:
            found = json.loads(content)
            wrong = "" if found["format"] == _FORMAT else "of another version"
        except (ValueError, KeyError, TypeError):
            wrong = "damaged"
        if wrong:
            raise SettingsError(
                f"--data-args: the index {self._kept.url}/{self._manifest} is {wrong}; delete it, so that it is written again"
            )
        return {shard["name"]: shard for shard in found["shards"]}

    def _read_table(self, shard: dict[str, Any]) -> Table | None:
        """Return the stored table of a shard, or None if it is missing or damaged."""
        content = self._kept.content(_file(shard))
        try:
            table = Table.from_bytes(content or b"")
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        return table if table.sha256 == shard["sha256"] else None


def _file(shard: dict[str, Any]) -> str:
    return f"{shard['name']}.{shard['sha256'][:16]}.npz"


def chunks(examples: int, most: int) -> Iterator[int]:
    """Yield the numbers of examples that are read at once."""
    for first in range(0, examples, most):
        yield min(most, examples - first)
