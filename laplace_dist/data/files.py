"""Files under a path or URL: found by split, read by byte ranges, and the same ones from the plan to the last read."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec

from laplace_dist.config.compatibility import is_url
from laplace_dist.data.file_errors import FileError, naming, outages_alone
from laplace_dist.data.file_names import is_hidden, kind_of, split_of
from laplace_dist.errors import SettingsError, listed

# By file system; a listing and a look at one file have to agree on it, which they do not on times of objects.
_VERSIONS = ("ETag", "etag", "generation", "mtime")
_AT_ONCE = 64  # files whose ends are in memory together


@dataclass(frozen=True)
class File:
    """A file as it was when the data set was opened.

    Attributes:
        path: Of its file system.
        name: Below the URL, for messages and digests.
        size: In bytes.
        version: What its file system tells replaced files by, such as an ETag or the time of the last change.
    """

    path: str
    name: str
    size: int
    version: str


class Place:
    """A path or URL that files lie under.

    Args:
        url: Path or URL.
        storage_options: For a URL; never shown.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url, self.options = url, dict(storage_options or {}) if is_url(url) else {}

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        given = {"use_listings_cache": False, **self.options} if is_url(self.url) else {}
        fs, root = fsspec.core.url_to_fs(self.url, **given)
        return fs, root.rstrip("/")

    @property
    def file_system(self) -> tuple[Any, str]:
        """The file system of fsspec, and the path of the URL in it."""
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    @cached_property
    def top(self) -> dict[str, str]:
        """What lies directly under the URL, by name: `file` or `directory`; nothing where that cannot be listed.

        Raises:
            FileError: The file system failed, and the same listing may succeed later.
        """
        with outages_alone(self.url, self.options):
            fs, root = self._opened
            found = fs.ls(root, detail=True)
            return self._typed(found, root)
        return {}

    def _typed(self, found: Sequence[Mapping[str, Any]], root: str) -> dict[str, str]:
        names = {info["name"].rstrip("/"): info["type"] for info in found}
        return {name.rpartition("/")[2]: kind for name, kind in names.items() if name != root}

    @property
    def is_file(self) -> bool:
        """Whether the URL is that of a file of a known kind.

        Raises:
            FileError: As of `top`.
        """
        with outages_alone(self.url, self.options):
            fs, root = self._opened
            return kind_of(root) is not None and fs.info(root)["type"] == "file"
        return False

    @property
    def splits(self) -> list[str]:
        """Names of the splits for which there are folders or files of a known kind."""
        found = {name if kind == "directory" else split_of(name) for name, kind in self.top.items()}
        return sorted(name for name in found if name and not is_hidden(name))

    @property
    def holds_files(self) -> bool:
        """Whether files of a known kind lie under the URL or in the folders directly under it.

        Raises:
            FileError: A folder cannot be listed.
        """
        if any(split_of(name) for name, kind in self.top.items() if kind != "directory"):
            return True
        return any(
            kind_of(name) for folder, kind in self.top.items() if kind == "directory" for name in self.names(folder)
        )

    def names(self, folder: str) -> list[str]:
        """Return what lies directly in a folder under the URL.

        Raises:
            FileError: It cannot be listed.
        """
        fs, root = self._opened
        with naming(folder, self.options, "cannot be listed"):
            found = fs.ls(f"{root}/{folder}", detail=True)
        return [info["name"].rstrip("/").rpartition("/")[2] for info in found]

    def files(self, split: str) -> tuple[str, list[File]]:
        """Return the kind of a split's files and the files, ordered by their names.

        They are those in the folder `<split>/` and below; or `<split>.parquet`; or `<split>-00000-of-00012.parquet` and so on.
        Names that begin with a dot or an underscore are passed over, as are files of other kinds.

        Raises:
            SettingsError: There are none, they are of several kinds, or they lie in two of these ways.
            FileError: They cannot be listed.
        """
        inside = self._inside(split) if self.top.get(split) == "directory" else []
        names = [name for name, kind in self.top.items() if kind != "directory" and split_of(name) == split]
        ways = [[info for info in inside if kind_of(info["name"])], [self._info(name) for name in names]]
        if all(ways) or (len(names) > 1 and any(name.rpartition(".")[0] == split for name in names)):
            some = [self._name(info["name"]) for way in ways for info in way[:2]]
            raise SettingsError(
                f"--data: {self.url!r} has split {split!r} twice ({listed(sorted(some))}); keep one folder {split}/, or one "
                f"file {split}.parquet, or files {split}-00000-of-00012.parquet"
            )
        found = sorted(map(self._file, [*ways[0], *ways[1]]), key=lambda file: file.name)
        if not found:
            raise self._no_split(split, inside)
        kinds = sorted({str(kind_of(file.name)) for file in found})
        if len(kinds) > 1:
            raise SettingsError(
                f"--data: split {split!r} of {self.url!r} has files of several kinds ({listed(kinds)}); keep one"
            )
        return kinds[0], found

    def _no_split(self, split: str, inside: Sequence[Mapping[str, Any]]) -> SettingsError:
        """Return what is said where a split has no file of a known kind, among those in its folder."""
        there = f"it has {listed(self.splits)}" if self.splits else "nothing lies there"
        names = [info["name"] for info in inside]
        packed = [name for name in names if re.search(r"\.(tar\.|tgz$|tbz|parquet\.|csv|jsonl?$)", name)]
        said = f" with files of a known kind ({self._name(packed[0])} is of none)" if packed else ""
        return SettingsError(f"--data: {self.url!r} has no split {split!r}{said}; {there}")

    def _inside(self, split: str) -> list[Mapping[str, Any]]:
        """Return what is known of the files in a split's folder and below that are not hidden."""
        fs, root = self._opened
        with naming(split, self.options, "cannot be listed"):
            found = fs.find(f"{root}/{split}", detail=True).values()
        return [info for info in found if not is_hidden(self._name(info["name"]))]

    def _info(self, name: str) -> Mapping[str, Any]:
        fs, root = self._opened
        with naming(name, self.options):
            return fs.info(f"{root}/{name}")

    def _file(self, info: Mapping[str, Any]) -> File:
        if info["size"] is None:  # some listings do not tell
            info = self._info(self._name(info["name"]))
        return File(info["name"], self._name(info["name"]), info["size"], _version(info))

    def _name(self, path: str) -> str:
        return path.removeprefix(self._opened[1]).lstrip("/")

    # -------------------------------------------------------------- reading

    def check(self, file: File) -> None:
        """Refuse a file that is not the one it was when the data set was opened.

        Raises:
            FileError: Naming the file.
        """
        with self._naming(file):
            now = self._file(self._opened[0].info(file.path))
        if (now.size, now.version) != (file.size, file.version):
            raise FileError(
                f"{file.name} has changed since the data set was opened ({file.size} bytes then, {now.size} now); leave "
                "the data as they are while a job is at work, and start it again"
            )

    def read(self, file: File, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return byte ranges of a file, given as `(start, stop)`, asked for together.

        Raises:
            FileError: They cannot be read or are not there; naming the file.
        """
        if not ranges:
            return []
        with self._naming(file):
            found = self._opened[0].cat_ranges(
                [file.path] * len(ranges),
                [start for start, _ in ranges],
                [stop for _, stop in ranges],
                on_error="raise",
            )
        for content, (start, stop) in zip(found, ranges, strict=True):
            _check_length(file, content, start, stop)
        return found

    def ends(self, files: Sequence[File], count: int) -> Iterator[tuple[File, bytes]]:
        """Yield files with the last bytes of each, up to `count`, asked for together in groups.

        Raises:
            FileError: Naming the file, or the first of its group.
        """
        for first in range(0, len(files), _AT_ONCE):
            group = files[first : first + _AT_ONCE]
            starts = [max(file.size - count, 0) for file in group]
            with self._naming(group[0]):
                paths, stops = [file.path for file in group], [file.size for file in group]
                found = self._opened[0].cat_ranges(paths, starts, stops, on_error="raise")
            for file, content, start in zip(group, found, starts, strict=True):
                _check_length(file, content, start, file.size)
                yield file, content

    def open(self, file: File) -> Any:
        """Return a file opened for reading in order."""
        with self._naming(file):
            return self._opened[0].open(file.path, "rb")

    def content(self, name: str) -> bytes | None:
        """Return a small file below the URL, or None if there is none.

        Raises:
            FileError: It cannot be read.
        """
        fs, root = self._opened
        with naming(name, self.options):
            try:
                return fs.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None

    def put(self, name: str, content: bytes) -> None:
        """Write a file below the URL, whole or not at all.

        Raises:
            FileError: It cannot be written.
        """
        fs, root = self._opened
        path = f"{root}/{name}"
        other = f"{path}.{uuid.uuid4().hex}"
        with naming(f"{self.url}/{name}", self.options, "cannot be written"):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(other, content)
            fs.mv(other, path)

    def _naming(self, file: File) -> AbstractContextManager[None]:
        return naming(file.name, self.options)


def _check_length(file: File, content: bytes, start: int, stop: int) -> None:
    if len(content) < stop - start:
        raise FileError(f"{file.name} ends within bytes {start} to {stop}: it is truncated; restore it")
    if len(content) > stop - start:
        raise FileError(
            f"{file.name}: {len(content)} bytes came for bytes {start} to {stop}; give a URL whose server sends parts of files"
        )


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]).strip('"') for key in _VERSIONS if key in info), "")
