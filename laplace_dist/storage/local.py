"""Durable, atomic writes to a local disk: what a crash at any instant leaves is the old state or the new one."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

TEMP = ".tmp-"
_THREADS = 8
# What `link` answers where there are no hard links, as on FAT and some FUSE file systems; the file is this process's own.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class NoHardLinks(OSError):
    """The file system has no hard links, so it cannot create a file whole and only if there is none."""


def _fsync(path: str) -> None:
    """Flush a file's data, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_dirs(path: str) -> None:
    """Create a directory and its parents so that they outlive a power cut."""
    missing, parent = [], path
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    os.makedirs(path, exist_ok=True)
    for made in missing:
        _fsync(os.path.dirname(made))


@contextmanager
def _temp_file(path: str, data: bytes) -> Iterator[str]:
    """Yield a flushed temporary file with these bytes beside `path`; it is gone afterwards, whatever happens."""
    folder = os.path.dirname(path)
    _make_dirs(folder)
    temp = os.path.join(folder, f"{TEMP}{uuid.uuid4().hex}")
    try:
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temp
    finally:
        if os.path.lexists(temp):
            os.unlink(temp)
    _fsync(folder)


def link_new(path: str, data: bytes) -> bool:
    """Create `path` with these bytes all at once, unless it exists; True if this call created it.

    Raises:
        NoHardLinks: The file system has none.
        OSError: It cannot be written.
    """
    with _temp_file(path, data) as temp:
        try:
            os.link(temp, path)
        except FileExistsError:
            return os.path.samefile(temp, path)  # a network file system may repeat a link that had succeeded
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise NoHardLinks(error.errno, error.strerror, path) from error
            raise
    return True


def swap(path: str, expected: bytes, data: bytes) -> bool:
    """Overwrite `path` atomically if it holds the expected bytes; those who swap at the same time wait for each other.

    Raises:
        OSError: It cannot be read or written, or the file system has no locks.
    """
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with open(path, "rb") as file:
            if file.read() != expected:
                return False
        replace(path, data)
        return True
    finally:
        os.close(folder)


def replace(path: str, data: bytes) -> None:
    """Overwrite `path` atomically."""
    with _temp_file(path, data) as temp:
        os.replace(temp, path)


def tree(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every directory under `top`, itself included, with the names of its files.

    Raises:
        OSError: A directory cannot be listed; one that is gone has no files.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, _, names in os.walk(top, onerror=refuse):
        yield folder, names


def files(top: str) -> list[str]:
    """Return the path of every file under `top`; raises as `tree`."""
    return [os.path.join(folder, name) for folder, names in tree(top) for name in names]


def times(top: str) -> dict[str, float]:
    """Return when every file under `top` was last written, in seconds since 1970, by path; raises as `tree`."""
    found = {}
    for path in files(top):
        with suppress(FileNotFoundError):
            found[path] = os.lstat(path).st_mtime
    return found


def sync_tree(top: str, root: str) -> None:
    """Flush every file and directory under `top`, and the directories from there up to the one above `root`.

    All at once, because a file system's journal serves waiting flushes together: 120 of them take 15 ms, not 500.
    """
    paths = [os.path.join(folder, name) for folder, names in tree(top) for name in ["", *names]]
    while len(top) >= len(root):
        top = os.path.dirname(top)
        paths.append(top)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_fsync, paths))
