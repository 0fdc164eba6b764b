"""Byte objects with create-only commits, and checksummed Zarr arrays on top of them, for any fsspec URL."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import inspect
import json
import os
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np
import zarr
import zarr.storage
from fsspec.implementations.local import LocalFileSystem
from zarr.codecs import BloscCodec, Crc32cCodec

from laplace_dist import localdisk
from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError
from laplace_dist.packing import check_key, check_names, pack, unpack

try:  # the remote file systems' own failures, where they are installed
    from botocore.exceptions import BotoCoreError, ClientError

    _FAILURES: tuple[type[Exception], ...] = (OSError, asyncio.TimeoutError, BotoCoreError, ClientError)
except ImportError:
    _FAILURES = (OSError, asyncio.TimeoutError)

CHUNK_BYTES = 64 * 2**20
_THREADS = 8
_GROUP = json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}).encode()
_RERUN = "Run the same command again: it continues from what is committed."


class Store:
    """Objects under one URL: a local directory, or anything that fsspec opens and that can create without overwriting.

    It opens its file system on first use and pickles as its arguments, so that every process opens its own.

    Args:
        url: Directory or URL, such as `runs/digits` or `s3://bucket/run`.
        storage_options: Passed to the file system: endpoint, key, secret. Never shown.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
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
            found = self._fs.cat([self._path(key) for key in group], on_error="return")
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
            return localdisk.link_new(path, data) if self.is_local else self._create_remote(path, data)

    def replace(self, key: str, data: bytes) -> None:
        """Write an object over the old one; readers see the old or the new bytes, never a mixture."""
        path = self._path(key)
        with self._reporting(key, "write"):
            if self.is_local:
                localdisk.replace(path, data)
            else:
                self._fs.pipe_file(path, data)

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
                if recursive:
                    paths = self._fs.find(top)
                else:
                    paths = [i["name"] for i in self._fs.ls(top, detail=True) if i["type"] == "file"]
            except (FileNotFoundError, NotADirectoryError):
                return []
        paths = [path for path in paths if path.startswith(top + "/") and localdisk.TEMP not in path[len(top) :]]
        return sorted(path[len(self._root) + 1 :] for path in paths)

    def delete_tree(self, prefix: str) -> None:
        """Delete the object with this key and every object under it; nothing happens where there is none."""
        path = self._path(prefix)
        with self._reporting(prefix, "delete"):
            try:
                self._fs.rm(path, recursive=True)
            except FileNotFoundError:
                return

    def check_writable(self) -> None:
        """Create and delete a small object, so that a bad location is refused before any work is done.

        Raises:
            SettingsError: It cannot be written to.
            RunFailed: No space is left.
        """
        probe = f"probe-{uuid.uuid4().hex}"
        self.create(probe, b"probe")
        self.delete_tree(probe)

    # -------------------------------------------------------------- arrays

    def write_arrays(
        self, prefix: str, arrays: Mapping[str, np.ndarray], symmetric: Collection[str] = ()
    ) -> dict[str, dict[str, Any]]:
        """Write a Zarr v3 group under a prefix that nobody has used, flush it, and read all of it back.

        Args:
            prefix: Key of the group, unique to this attempt.
            arrays: Float32 or float64 arrays by name; `/` in a name makes nested groups.
            symmetric: Names of those, of shape `(..., d, d)`, to be symmetrised and stored as lower triangles.

        Returns:
            What `read_array` needs for each name: sha256 of the stored numbers and of the array's metadata, shape,
            dtype, whether packed, and the stored size in bytes.

        Raises:
            RunFailed: No space is left.
            CheckpointError: A name is not usable, or the bytes read back are not those written.
        """
        check_names(arrays)
        groups = {"/".join(name.split("/")[:i]) for name in arrays for i in range(name.count("/") + 1)}
        for group in sorted(groups | {""}):
            self._put("/".join(filter(None, [prefix, group, "zarr.json"])), _GROUP)

        def write(name: str) -> dict[str, Any]:
            return self._write_array(f"{prefix}/{name}", arrays[name], name in symmetric)

        with ThreadPoolExecutor(1 if self.is_local else _THREADS) as pool:  # requests to an object store overlap
            entries = dict(zip(arrays, pool.map(write, arrays), strict=True))
        if self.is_local:
            with self._reporting(prefix, "write"):
                localdisk.sync_tree(self._path(prefix), self._root)
        return entries

    def read_array(self, prefix: str, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        """Return one array after checking its metadata, shape, dtype, every chunk and the sha256 of its numbers.

        Raises:
            CheckpointError: Something is missing, truncated or altered; the message names the object.
        """
        check_names([name])
        key = f"{prefix}/{name}"
        memory, array = self._open_array(key, entry)
        values = np.empty(array.shape, array.dtype)
        for number, rows in _chunks(array):
            self._load_chunk(key, memory, number, values, array, rows)
        if _sha256(values) != entry["sha256"]:
            raise self._altered(key, "its numbers do not have the sha256 in the manifest")
        return unpack(values) if entry["packed"] else values

    def _write_array(self, key: str, value: np.ndarray, packed: bool) -> dict[str, Any]:
        value = np.asarray(value)
        if value.dtype not in (np.float32, np.float64):
            raise CheckpointError(f"{self._where(key)} has dtype {value.dtype}; factors are float32 or float64")
        stored = pack(value) if packed else np.ascontiguousarray(value).reshape(value.shape)
        memory, array = _new_array(stored, {"packed": "lower triangle, row by row"} if packed else {})
        metadata = memory.pop("zarr.json").to_bytes()
        self._put(f"{key}/zarr.json", metadata)
        size, back, digest = len(metadata), np.empty_like(stored), _sha256(stored)
        for number, rows in _chunks(array):
            array[rows] = stored[rows]
            data = memory.pop(number).to_bytes()
            self._put(f"{key}/{number}", data)
            size += len(data)
            self._load_chunk(key, memory, number, back, array, rows)
        if self.read(f"{key}/zarr.json") != metadata or _sha256(back) != digest:
            raise self._altered(key, "what was read back is not what was written")
        return {
            "sha256": digest,
            "shape": list(value.shape),
            "dtype": value.dtype.name,
            "packed": packed,
            "metadata_sha256": hashlib.sha256(metadata).hexdigest(),
            "stored_bytes": size,
        }

    def _open_array(self, key: str, entry: Mapping[str, Any]) -> tuple[dict[str, Any], zarr.Array]:
        metadata = self.read(f"{key}/zarr.json")
        if hashlib.sha256(metadata).hexdigest() != entry["metadata_sha256"]:
            raise self._altered(f"{key}/zarr.json", "it does not have the sha256 in the manifest")
        memory = {"zarr.json": zarr.core.buffer.cpu.Buffer.from_bytes(metadata)}
        array = zarr.open_array(zarr.storage.MemoryStore(memory), mode="r", zarr_format=3)
        *lead, size = entry["shape"] or [0]
        shape = (*lead[:-1], size * (size + 1) // 2) if entry["packed"] else tuple(entry["shape"])
        if array.shape != shape or array.dtype.name != entry["dtype"]:
            found = f"{array.shape} {array.dtype.name}"
            raise self._altered(key, f"it holds {found}, the manifest says {shape} {entry['dtype']}")
        return memory, array

    def _load_chunk(self, key: str, memory: dict, number: str, out: np.ndarray, array: zarr.Array, rows: Any) -> None:
        """Read one stored chunk, decode it (which checks its crc32c) and put it where it belongs in `out`."""
        memory[number] = zarr.core.buffer.cpu.Buffer.from_bytes(self.read(f"{key}/{number}"))
        try:
            out[rows] = array[rows]
        except (ValueError, RuntimeError, TypeError) as error:
            raise self._altered(f"{key}/{number}", f"it does not decode ({error})") from error
        finally:
            del memory[number]

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
            options = dict(self._options)
            if "://" in self.url and not self.url.startswith(("file:", "local:")):
                options.setdefault("use_listings_cache", False)
            try:
                fs, root = fsspec.core.url_to_fs(self.url, **options)
            except (ValueError, ImportError, TypeError) as error:
                reason = self._scrub(f"{type(error).__name__}: {error}")
                raise SettingsError(f"--checkpoint {self.url!r}: cannot be opened ({reason})") from None
            _check_creates(fs, self.url)
            self._opened = fs, root.rstrip("/")
        return self._opened

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _info(self, key: str) -> dict[str, Any] | None:
        path = self._path(key)
        with self._reporting(key, "look up"):
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

    def _create_remote(self, path: str, data: bytes, tries: int = 5) -> bool:
        """Create on an object store; whatever a request answered, what is stored decides."""
        for attempt in range(tries):
            try:
                self._fs.pipe_file(path, data, mode="create")
                return True
            except (PermissionError, FileNotFoundError):
                raise
            except _FAILURES as error:  # exists; or a conflict with a write in progress; or the answer was lost
                failure = error
            try:
                return self._fs.cat_file(path) == data
            except FileNotFoundError:
                time.sleep(0.1 * 2**attempt)
        raise failure

    # -------------------------------------------------------------- messages

    @contextmanager
    def _reporting(self, key: str, verb: str) -> Iterator[None]:
        """Turn the file system's errors into ones that name the object and the remedy."""
        try:
            yield
        except _FAILURES as error:
            raise self._explain(error, key, verb) from (error if self.is_local else None)

    def _explain(self, error: Exception, key: str, verb: str) -> Exception:
        reason = self._scrub(f"{type(error).__name__}: {error}")
        number = getattr(error, "errno", None)
        if verb == "write":
            if number in (errno.ENOSPC, errno.EDQUOT):
                return RunFailed(
                    f"{self._where(key)}: no space left on the device while writing it; nothing of it is committed. "
                    f"Free some space. {_RERUN}"
                )
            refused = PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError
            if isinstance(error, refused) or number in (errno.EROFS, errno.EPERM, errno.ENOTSUP):
                return SettingsError(
                    f"--checkpoint {self.url!r}: cannot write {key!r} there ({reason}). "
                    "Give a directory, or a URL with its --storage-options, that this process may write to."
                )
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            return self._missing(key)
        return CheckpointError(f"{self._where(key)}: could not {verb} it ({reason}). Check the storage. {_RERUN}")

    def _missing(self, key: str) -> MissingObjectError:
        return MissingObjectError(f"{self._where(key)} is missing. {_remedy(key)}")

    def _altered(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._where(key)} is truncated or altered: {why}. {_remedy(key)}")

    def _where(self, key: str) -> str:
        return f"{self.url.rstrip('/')}/{key}"

    def _scrub(self, text: str) -> str:
        """Remove the values of the storage options from a message."""
        for value in _leaves(self._options):
            text = text.replace(value, "***")
        return text


def _remedy(key: str) -> str:
    """Say what to do about a bad object."""
    parts = key.split("/")
    does = {"partials": "it recomputes that segment", "posteriors": "it reduces the partials anew"}
    if parts[0] in does and len(parts) > 1:
        manifest = f"{parts[0]}/{parts[1].removesuffix('.json')}.json"
        return f"Restore it from a copy, or delete {manifest} and run the same command again: {does[parts[0]]}."
    if parts[0] in ("tuning", "evaluation") and len(parts) > 1:
        return f"Restore it from a copy, or delete everything under {parts[0]}/ and run the same command again."
    return "Restore it from a copy, or start again with --fresh."


def _leaves(value: Any) -> Iterator[str]:
    """Yield every string of four or more characters in nested options, the longest first."""
    if isinstance(value, Mapping):
        found = [leaf for item in value.values() for leaf in _leaves(item)]
    elif isinstance(value, list | tuple):
        found = [leaf for item in value for leaf in _leaves(item)]
    else:
        found = [value] if isinstance(value, str) and len(value) >= 4 else []
    yield from sorted(found, key=len, reverse=True)


def _check_creates(fs: Any, url: str) -> None:
    """Refuse a file system that cannot create an object without overwriting one."""
    if isinstance(fs, LocalFileSystem):
        return
    kind = type(fs)
    method = kind._pipe_file if fs.async_impl else kind.pipe_file
    inherited = method is getattr(fsspec.AbstractFileSystem, "pipe_file", None)
    if inherited or "mode" not in inspect.signature(method).parameters:
        raise SettingsError(
            f"--checkpoint {url!r}: {kind.__name__} has no create-only write, so two workers could overwrite each "
            "other. Use a local directory, or an object store such as s3://"
        )


def _new_array(value: np.ndarray, attributes: dict[str, str]) -> tuple[dict[str, Any], zarr.Array]:
    """Return an empty Zarr array in memory, with its dictionary of objects, that fits the value."""
    memory: dict[str, Any] = {}
    row = max(1, value[:1].nbytes) if value.ndim else value.nbytes
    first = (max(1, min(value.shape[0], CHUNK_BYTES // row)),) if value.ndim else ()
    array = zarr.create_array(
        zarr.storage.MemoryStore(memory),
        shape=value.shape,
        dtype=value.dtype,
        chunks=(*first, *(max(1, n) for n in value.shape[1:])),
        compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
        fill_value=np.nan,
        attributes=attributes,
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    return memory, array


def _chunks(array: zarr.Array) -> Iterator[tuple[str, Any]]:
    """Yield the key of every chunk with the rows that it holds; chunks split the first axis only."""
    if array.ndim == 0:
        yield "c", ()
    elif array.size:
        for number, start in enumerate(range(0, array.shape[0], array.chunks[0])):
            yield "/".join(["c", str(number), *["0"] * (array.ndim - 1)]), slice(start, start + array.chunks[0])


def _sha256(value: np.ndarray) -> str:
    """Digest an array's bytes in C order."""
    return hashlib.sha256(memoryview(value).cast("B") if value.size else b"").hexdigest()
