"""The chunks of a stored array: their keys, and from stored bytes to numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import Blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

_CODECS = [BytesCodec, BloscCodec, Crc32cCodec]


def chunks(array: zarr.Array) -> Iterator[tuple[str, Any]]:
    """Yield the key of every chunk with the rows that it holds; chunks split the first axis only."""
    if array.ndim == 0:
        yield "c", ()
    elif array.size:
        step = array.chunks[0]
        for number, start in enumerate(range(0, array.shape[0], step)):
            rows = slice(start, min(start + step, array.shape[0]))
            yield "/".join(["c", str(number), *["0"] * (array.ndim - 1)]), rows


def decode(array: zarr.Array, memory: dict[str, Any], number: str, rows: Any, data: bytes) -> np.ndarray:
    """Return the numbers of one chunk, after checking its crc32c.

    What this package writes is decoded here, since zarr decodes into one buffer and copies it to another, of 16 MiB each,
    which the kernel hands out anew every time: on the way from a disk to a sum that is a fifth of the processor's time.

    Args:
        array: The array.
        memory: The objects of the store that the array was opened from, among which zarr looks for the chunk.
        number: Key of the chunk.
        rows: That it holds.
        data: Its stored bytes.

    Returns:
        In C order; not always writable.

    Raises:
        ValueError, RuntimeError, TypeError: It does not decode.
    """
    if not _written_here(array):
        memory[number] = zarr.core.buffer.cpu.Buffer.from_bytes(data)
        try:
            return np.asarray(array[rows], order="C")
        finally:
            del memory[number]
    stored = np.frombuffer(data, np.uint8)
    body, wanted = stored[:-4], int.from_bytes(stored[-4:].tobytes(), "little")
    if (found := google_crc32c.value(body)) != wanted or len(stored) < 4:
        raise ValueError(f"its crc32c is {found:08x}, it says {wanted:08x}")
    numbers = np.frombuffer(Blosc().decode(body), array.dtype).reshape(array.chunks)
    return numbers[: rows.stop - rows.start] if rows != () else numbers


def _written_here(array: zarr.Array) -> bool:
    """Say whether an array has the codecs of this package, and numbers in the byte order of this machine."""
    codecs = array.metadata.codecs
    if [type(codec) for codec in codecs] != _CODECS or sys.byteorder != "little":
        return False
    # as it is stored, since releases of zarr differ in what the codec's own attribute is
    return codecs[0].to_dict().get("configuration", {}).get("endian") == "little"
