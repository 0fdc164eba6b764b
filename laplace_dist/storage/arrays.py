"""Checksummed Zarr arrays on top of any store of bytes: what was not read back whole is never committed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import tee
from typing import Any

import numpy as np
import zarr
import zarr.storage
from zarr.codecs import BloscCodec, Crc32cCodec

from laplace_dist.errors import CheckpointError
from laplace_dist.storage.chunks import chunks, decode
from laplace_dist.storage.keys import check_names
from laplace_dist.storage.pieces import Ahead, Loaded, Piece, in_order
from laplace_dist.storage.triangles import mirror, pack, triangle, unpack

# Compressing, sending and reading back hold about four chunks for each array in progress, and each chunk is a request: with
# 16 MiB a segment of a ViT-B costs 378 of them, with 8 MiB 626.
CHUNK_BYTES = 16 * 2**20
# In one go: left alone, blosc gives zstd 32 KiB at this level, which takes it twice as long and compresses less.
_BLOCK_BYTES = 512 * 2**10
_REQUESTS = 32  # at once to an object store, where each waits for the network; fewer where chunks are large,
_IN_FLIGHT = 256 * 2**20  # so that they hold no more bytes than these
_GROUP = json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}).encode()


class Arrays:
    """The part of a store that holds arrays; `read`, `_put`, `_flush` and the messages come from the store itself."""

    def write_arrays(
        self, prefix: str, arrays: Mapping[str, np.ndarray], symmetric: Collection[str] = ()
    ) -> dict[str, dict[str, Any]]:
        """Write a Zarr v3 group under a prefix that nobody has used, flush it, and read all of it back.

        Args:
            prefix: Key of the group, unique to this attempt.
            arrays: Float32 or float64 arrays by name, or what looks like one and is computed as it is sliced; `/` in a name
                makes nested groups.
            symmetric: Names of those, of shape `(..., d, d)`, to be symmetrised and stored as lower triangles.

        Returns:
            What `read_array` needs for each name: sha256 of the stored numbers and of the array's metadata, shape,
            dtype, whether packed, and the stored size in bytes.

        Raises:
            RunFailed: No space is left.
            CheckpointError: A name is not usable, or the bytes read back are not those written.
        """
        check_names(arrays)

        def write(name: str) -> dict[str, Any]:
            return self._write_array(f"{prefix}/{name}", arrays[name], name in symmetric)

        with ThreadPoolExecutor(1 if self.is_local else _threads(arrays)) as pool:
            groups = pool.map(lambda key: self._put(key, _GROUP), self.group_keys(prefix, arrays))
            entries = dict(zip(arrays, pool.map(write, arrays), strict=True))
            list(groups)  # raises what went wrong there
        self._flush(prefix)
        return entries

    @staticmethod
    def group_keys(prefix: str, names: Collection[str]) -> list[str]:
        """Return the keys of the metadata of the group under a prefix and of those nested in it."""
        groups = {"/".join(name.split("/")[:i]) for name in names for i in range(name.count("/") + 1)}
        return ["/".join(filter(None, [prefix, group, "zarr.json"])) for group in sorted(groups | {""})]

    def check_group(self, key: str) -> None:
        """Check the metadata of one group, which readers of the whole group need and `read_array` does not.

        Raises:
            CheckpointError: It is missing or altered.
        """
        if self.read(key) != _GROUP:
            raise self._altered(key, "it is not the metadata of a group")

    def read_array(self, prefix: str, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        """Return one array after checking its metadata, shape, dtype, every chunk and the sha256 of its numbers.

        Raises:
            CheckpointError: Something is missing, truncated or altered; the message names the object.
        """
        value = None
        for pieces in self.read_pieces([(prefix, name, entry)]):
            for rows, piece in pieces:
                value = np.empty(entry["shape"], piece.dtype) if value is None else value
                _set_rows(value, rows, piece, entry["packed"])
        value = np.empty(entry["shape"], entry["dtype"]) if value is None else value
        for matrix in _matrices(value) if entry["packed"] else ():
            mirror(matrix)
        return value

    def read_pieces(self, wanted: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Iterator[Loaded]:
        """Yield, for every `(prefix, name, entry)` in order, an iterator over the `(rows, piece)` that are stored of it.

        It raises as `read_array` does; that the sha256 of all pieces is not the entry's can be said after the last one only, so
        that nothing made of them counts before the iterator has ended. A bad array raises when its turn comes, and the others
        are read. A packed array's pieces are rows of its triangles.

        Memory: a piece is a stored chunk, 16 MiB or less. One is in hand; behind it, of a directory one more is being read and
        decoded, of an object store up to three are, or as many small ones. One that is being decoded is there twice.
        """
        opened, given = tee(wanted)
        opens = (partial(self._pieces, *one) for one in opened)
        for pieces in in_order(opens, self.ahead):
            prefix, name, entry = next(given)
            yield self._verified(f"{prefix}/{name}", entry, pieces)

    @property
    def ahead(self) -> Ahead:
        """How much of arrays is read ahead: one thread keeps up with a disk; at an object store each request waits."""
        return Ahead(1, 2, CHUNK_BYTES) if self.is_local else Ahead(_REQUESTS, _REQUESTS, 3 * CHUNK_BYTES)

    def _pieces(self, prefix: str, name: str, entry: Mapping[str, Any]) -> list[Piece]:
        """Open an array, which checks its metadata, shape and dtype, and return the pieces that it is stored in."""
        check_names([name])
        key = f"{prefix}/{name}"
        memory, array = self._open_array(key, entry)
        row = math.prod(array.shape[1:]) * array.dtype.itemsize
        found = []
        for number, rows in chunks(array):
            size = row * (rows.stop - rows.start) if array.ndim else row
            found.append(Piece(rows, size, partial(self._load_chunk, key, memory, number, array, rows)))
        return found

    def _verified(self, key: str, entry: Mapping[str, Any], pieces: Loaded) -> Loaded:
        """Yield pieces; raise at their end if they have not the sha256 in the manifest."""
        digest = hashlib.sha256()
        for rows, piece in pieces:
            digest.update(piece)
            yield rows, piece
            del piece  # before the next one is waited for
        if digest.hexdigest() != entry["sha256"]:
            raise self._altered(key, "its numbers do not have the sha256 in the manifest")

    def _write_array(self, key: str, value: np.ndarray, packed: bool) -> dict[str, Any]:
        value = np.asarray(value) if isinstance(value, np.generic) else value
        if value.dtype not in (np.float32, np.float64):
            raise CheckpointError(f"{self._where(key)} has dtype {value.dtype}; factors are float32 or float64")
        memory, array = _new_array(
            _stored_shape(value.shape, packed), value.dtype, {"packed": "lower triangle, row by row"} if packed else {}
        )
        metadata = memory.pop("zarr.json").to_bytes()
        self._put(f"{key}/zarr.json", metadata)
        size, digest, same = len(metadata), hashlib.sha256(), True
        for number, rows in chunks(array):
            part = _rows(value, rows, packed)
            digest.update(part)
            array[rows] = part
            data = memory.pop(number).to_bytes()
            self._put(f"{key}/{number}", data)
            size += len(data)
            same = same and _same_bytes(self._load_chunk(key, memory, number, array, rows), part)
        if self.read(f"{key}/zarr.json") != metadata or not same:
            raise self._altered(key, "what was read back is not what was written")
        return {
            "sha256": digest.hexdigest(),
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
        try:
            array = zarr.open_array(zarr.storage.MemoryStore(memory), mode="r", zarr_format=3)
        except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
            raise self._altered(f"{key}/zarr.json", f"it describes no array of numbers ({error})") from error
        if entry["packed"] and (len(entry["shape"]) < 2 or entry["shape"][-1] != entry["shape"][-2]):
            raise self._altered(key, f"the manifest calls shape {entry['shape']} a packed symmetric matrix")
        shape = _stored_shape(entry["shape"], entry["packed"])
        if array.shape != shape or array.dtype.name != entry["dtype"]:
            found = f"{array.shape} {array.dtype.name}"
            raise self._altered(key, f"it holds {found}, the manifest says {shape} {entry['dtype']}")
        return memory, array

    def _load_chunk(self, key: str, memory: dict, number: str, array: zarr.Array, rows: Any) -> np.ndarray:
        """Read one stored chunk and decode it, which checks its crc32c."""
        data = self.read(f"{key}/{number}")
        try:
            return decode(array, memory, number, rows, data)
        except (ValueError, RuntimeError, TypeError) as error:
            raise self._altered(f"{key}/{number}", f"it does not decode ({error})") from error


def _threads(arrays: Mapping[str, np.ndarray]) -> int:
    """Return how many arrays are written at once to an object store."""
    largest = max((min(value.nbytes, CHUNK_BYTES) for value in arrays.values()), default=1)
    return min(_REQUESTS, _IN_FLIGHT // (4 * max(1, largest)))


def _stored_shape(shape: Sequence[int], packed: bool) -> tuple[int, ...]:
    """Return the shape in which an array is stored: triangles, if packed, in place of its last two axes."""
    return (*shape[:-2], triangle(shape[-1])) if packed else tuple(shape)


def _matrices(value: np.ndarray) -> np.ndarray:
    """View an array of shape `(..., d, d)` as one of shape `(n, d, d)`."""
    return value.reshape(math.prod(value.shape[:-2]), *value.shape[-2:])


def _rows(value: np.ndarray, rows: Any, packed: bool) -> np.ndarray:
    """Return some rows, along the first axis of what is stored, in C order."""
    if not packed:
        return np.asarray(value[rows], order="C")
    if value.ndim == 2:
        return pack(value, rows.start, rows.stop)
    size = triangle(value.shape[-1])
    part = np.stack([pack(matrix, 0, size) for matrix in _matrices(value[rows])])
    return part.reshape(-1, *value.shape[1:-2], size)


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Say whether two arrays hold the same bytes, those of NaN and of zeros too."""
    words = np.dtype(f"u{one.itemsize}")
    return np.array_equal(one.reshape(-1).view(words), other.reshape(-1).view(words))


def _set_rows(value: np.ndarray, rows: Any, part: np.ndarray, packed: bool) -> None:
    """Put rows of what is stored where they belong; of a packed array only the lower triangles."""
    if not packed:
        value[rows] = part
    elif value.ndim == 2:
        unpack(value, rows.start, part)
    else:
        for matrix, triangle_ in zip(_matrices(value[rows]), part.reshape(-1, part.shape[-1]), strict=True):
            unpack(matrix, 0, triangle_)


def _new_array(
    shape: tuple[int, ...], dtype: np.dtype, attributes: dict[str, str]
) -> tuple[dict[str, Any], zarr.Array]:
    """Return an empty Zarr array in memory, with its dictionary of objects."""
    memory: dict[str, Any] = {}
    row = max(1, math.prod(shape[1:]) * dtype.itemsize)
    first = (max(1, min(shape[0], CHUNK_BYTES // row)),) if shape else ()
    array = zarr.create_array(
        zarr.storage.MemoryStore(memory),
        shape=shape,
        dtype=dtype,
        chunks=(*first, *(max(1, n) for n in shape[1:])),
        compressors=[
            BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", blocksize=_BLOCK_BYTES),
            Crc32cCodec(),
        ],
        fill_value=np.nan,
        attributes=attributes,
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
    return memory, array
