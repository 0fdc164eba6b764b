"""Byte objects with create-only commits, and checksummed Zarr arrays on top of them, for any fsspec URL."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from laplace_dist import outages
from laplace_dist.errors import SettingsError
from laplace_dist.storage import local, object_store
from laplace_dist.storage.arrays import Arrays
from laplace_dist.storage.keys import check_key, check_url
from laplace_dist.storage.messages import Messages


class Store(Arrays, Messages):
    """Objects under one URL: a local directory, or anything that fsspec opens and that can create without overwriting.

    It opens its file system on first use and pickles as its arguments, so that every process opens its own.

    Args:
        url: Directory or URL, such as `runs/digits` or `s3://bucket/run`.
        storage_options: Passed to the file system: endpoint, key, secret. Never shown.

    Raises:
        SettingsError: The URL holds credentials, or names no one place.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = check_url(os.fspath(url))
        self._options = dict(storage_options or {})
        self._opened: tuple[Any, str] | None = None

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url, self._options)

    # -------------------------------------------------------------- bytes

    def read(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            MissingObjectError: It is not there.
            CheckpointError: It cannot be read, or the key leaves the checkpoint.
            SettingsError: The credentials are refused, or there is no such bucket.
        """
        path = self._path(key)
        with self._reporting(key, "read"):
            return self._fs.cat_file(path)

    def read_many(self, keys: Collection[str], at_once: int = 256) -> Iterator[tuple[str, bytes]]:
        """Yield `(key, bytes)` in the order given, fetching up to `at_once` objects concurrently where that helps."""
        keys = list(keys)
        for start in range(0, len(keys), at_once):
            group = keys[start : start + at_once]
            if self.is_local or len(group) == 1:
                yield from ((key, self.read(key)) for key in group)
                continue
            found = self._fs.cat([self._path(key) for key in group])
            for key in group:
                with self._reporting(key, "read"):
                    if isinstance(value := found[self._path(key)], Exception):
                        raise value
                yield key, value

    def create(self, key: str, data: bytes) -> bool:
        """Create an object, whole and durable, unless it exists.

        Returns:
            True if this call created it; False if it existed, which leaves it as it was. On an object store a retried
            request can meet its own write: there an existing object with the same bytes counts as created, so data
            that must tell two writers apart carries an attempt id.

        Raises:
            RunFailed: No space is left.
            SettingsError: The location cannot be written to, or cannot create without overwriting.
        """
        path = self._path(key)
        with self._reporting(key, "write"):
            return local.link_new(path, data) if self.is_local else object_store.create(self._fs, path, data)

    def replace(self, key: str, data: bytes) -> None:
        """Write an object over the old one; readers see the old or the new bytes, never a mixture."""
        path = self._path(key)
        with self._reporting(key, "write"):
            if self.is_local:
                local.replace(path, data)
            else:
                self._fs.pipe_file(path, data)

    def swap(self, key: str, expected: bytes, data: bytes) -> bool:
        """Write an object over the old one if that has the expected bytes: compare and set.

        Returns:
            Whether the object has the new bytes now. As with `create`, data that must tell two writers apart carries an id.

        Raises:
            SettingsError: The storage cannot do that: it is neither a local directory nor S3.
            MissingObjectError: There is no such object.
        """
        path = self._path(key)
        if not self.is_local and not object_store.swaps(self._fs):
            raise SettingsError(
                f"--checkpoint {self.url!r}: {type(self.file_system).__name__} cannot replace an object on the condition that "
                "it has not changed, which promotions need. Use a local directory, or s3://"
            )
        with self._reporting(key, "swap"):
            swap = local.swap if self.is_local else partial(object_store.swap, self._fs)
            return swap(path, expected, data)

    def exists(self, key: str) -> bool:
        """Say whether there is an object with this key."""
        return self._info(key) is not None

    def size(self, key: str) -> int:
        """Return an object's size in bytes; raises MissingObjectError if it is not there."""
        info = self._info(key)
        if info is None:
            raise self._missing(key)
        return int(info["size"])

    def list(self, prefix: str = "", *, recursive: bool = True) -> list[str]:
        """Return the sorted keys under a prefix (whole path parts), or only those directly in it."""
        top = self._path(prefix) if prefix else self._root
        with self._reporting(prefix or ".", "list"):
            try:
                if recursive:  # fsspec would leave out a local directory that it cannot list
                    paths = local.files(top) if self.is_local else self._fs.find(top)
                else:
                    paths = [i["name"] for i in self._fs.ls(top, detail=True) if i["type"] == "file"]
            except (FileNotFoundError, NotADirectoryError) as error:
                if outages.no_bucket(error):
                    raise
                return []
        paths = [path for path in paths if path.startswith(top + "/") and local.TEMP not in path[len(top) :]]
        return sorted(path[len(self._root) + 1 :] for path in paths)

    def modified(self, prefix: str = "") -> dict[str, datetime]:
        """Return when every object was last written, by key; on a local disk with what a crash left half-written.

        Args:
            prefix: Only of what lies under it (whole path parts).
        """
        top = self._path(prefix) if prefix else self._root
        with self._reporting(prefix or ".", "list"):
            if self.is_local:
                found = {path: {"mtime": time} for path, time in local.times(top).items()}
            else:
                found = self._fs.find(top, detail=True)
        times = {path[len(self._root) + 1 :]: _time(info) for path, info in found.items()}
        return {key: times[key] for key in sorted(times)}

    def delete_tree(self, prefix: str) -> None:
        """Delete the object with this key and every object under it; nothing happens where there is none."""
        path = self._path(prefix)
        with self._reporting(prefix, "delete"):
            if not self.is_local:
                self._fs.rm(path)
                return
            with suppress(FileNotFoundError):
                self._fs.rm(path, recursive=True)

    def check_writable(self) -> None:
        """Create a small object twice and delete it, so that a bad location is refused before any work is done.

        Raises:
            SettingsError: It cannot be written to, or lets a second create-only write overwrite the first.
            RunFailed: No space is left.
        """
        probe = f"probe-{uuid.uuid4().hex}"
        self.create(probe, b"first")
        again, found = self.create(probe, b"second"), self.read(probe)
        self.delete_tree(probe)
        if again or found != b"first":
            raise SettingsError(
                f"--checkpoint {self.url!r}: {type(self.file_system).__name__} let a create-only write overwrite an object, so "
                "two workers could overwrite each other's results. Use a local directory, or an object store that honours "
                "If-None-Match, such as S3."
            )

    def check_swaps(self) -> None:
        """Replace a small object, once as it is and once as it is not, so that a store without conditions is refused at once.

        Raises:
            SettingsError: The storage has no compare and set, or ignores the condition.
        """
        probe = f"probe-{uuid.uuid4().hex}"
        self.create(probe, b"first")
        try:
            honoured = self.swap(probe, b"first", b"second")
            with self._reporting(probe, "swap"):
                ignored = not self.is_local and object_store.overwrites_changed(self._fs, self._path(probe))
        finally:
            self.delete_tree(probe)
        if not honoured or ignored:
            raise SettingsError(
                f"--checkpoint {self.url!r}: the store overwrote an object that was not as the request's If-Match says, so "
                "two promotions could overwrite each other. Use a local directory, or an object store that honours If-Match, "
                "such as S3."
            )

    def now(self) -> datetime:
        """Return the storage's own time, which the times of its objects are of, by writing a small object."""
        probe = f"probe-{uuid.uuid4().hex}"
        self.create(probe, b"")
        info = self._info(probe)
        self.delete_tree(probe)
        if info is None:
            raise self._missing(probe)
        return _time(info)

    def entries(self) -> list[str]:
        """Return what lies directly under the URL: names of objects, and of folders with a slash behind."""
        with self._reporting(".", "list"):
            try:
                found = self._fs.ls(self._root, detail=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                if outages.no_bucket(error):
                    raise
                return []
        inside = [info for info in found if info["name"].rstrip("/") != self._root]  # some list a folder within itself
        names = ((info["name"].rstrip("/").rpartition("/")[2], info["type"]) for info in inside)
        return sorted(name + ("/" if kind == "directory" else "") for name, kind in names)

    @property
    def file_system(self) -> Any:
        """The fsspec file system."""
        return getattr(self._fs, "fs", self._fs)

    # -------------------------------------------------------------- file system

    @property
    def is_local(self) -> bool:
        """Whether the objects are files of this machine."""
        return isinstance(self._fs, LocalFileSystem)

    @property
    def _fs(self) -> Any:
        return self._open()[0]

    @property
    def _root(self) -> str:
        return self._open()[1]

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = object_store.open_url(self.url, self._options)
        return self._opened

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _info(self, key: str) -> dict[str, Any] | None:
        path = self._path(key)
        with self._reporting(key, "find"):
            try:
                info = self._fs.info(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return info if info["type"] == "file" else None

    def _put(self, key: str, data: bytes) -> None:
        """Write a new object that no reader knows of yet; not flushed."""
        path = self._path(key)
        with self._reporting(key, "write"):
            if self.is_local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb") as file:
                    file.write(data)
            else:
                self._fs.pipe_file(path, data)

    def _flush(self, prefix: str) -> None:
        """Make everything under a prefix outlive a power cut; an object store has done so when it answers."""
        if self.is_local:
            with self._reporting(prefix, "write"):
                local.sync_tree(self._path(prefix), self._root)


def _time(info: Mapping[str, Any]) -> datetime:
    """Return an object's time of writing from what the file system says of it."""
    value = next(
        info[name] for name in ("mtime", "LastModified", "created", "last_modified", "updated") if name in info
    )
    value = datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value
    value = datetime.fromisoformat(value) if isinstance(value, str) else value
    return value if value.tzinfo else value.replace(tzinfo=UTC)
