"""Arrow IPC files (Feather version 2): chunks are record batches.

A footer says where batches lie, and not how many rows they have; that is in the header of each, which pyarrow reads only
together with its content. So the few fields that are needed are taken from the flatbuffers here, as the format's specification
(https://arrow.apache.org/docs/format/Columnar.html, File.fbs and Message.fbs) has them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import pyarrow as pa

from laplace_dist.data.files import File
from laplace_dist.data.sparse import Sparse
from laplace_dist.data.table_files import Described, TableFiles, tail_of

_MAGIC = b"ARROW1"
_BATCHES, _HEADER, _LENGTH = 3, 2, 0  # places of the fields in Footer, Message and RecordBatch
Block = tuple[int, int, int]  # of a record batch: offset, bytes of its header, bytes of its body


class ArrowFiles(TableFiles):
    """Rows of Arrow IPC files."""

    def _describe(self, file: File, tail: bytes) -> Described:
        footer = tail_of(self._place, file, tail, _footer_length(tail))
        blocks = _blocks(footer)
        headers = self._place.read(file, [(offset, offset + header) for offset, header, _ in blocks])
        counts = [_rows(header) for header in headers]
        schema = pa.ipc.open_file(Sparse(self._place, file, [(file.size - len(footer), footer)])).schema
        return Described(schema, counts, len(footer), hashlib.sha256(footer).digest())

    def _reader(self, file: File, footer: bytes) -> tuple[File, bytes, list[Block]]:
        return file, footer, _blocks(footer)

    def _table(self, reader: tuple[File, bytes, list[Block]], chunk: int, names: Sequence[str]) -> pa.Table:
        file, footer, blocks = reader
        content = Sparse(self._place, file, [(file.size - len(footer), footer)])
        offset, header, body = blocks[chunk]
        content.fetch([(offset, offset + header + body)])
        schema = pa.ipc.open_file(content).schema
        fields = [schema.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=sorted(fields))
        with pa.ipc.open_file(content, options=options) as batches:
            batch = batches.get_batch(chunk)
        batch.validate(full=True)
        return pa.Table.from_batches([batch])


def _footer_length(tail: bytes) -> int:
    if tail[-6:] != _MAGIC:
        stream = tail[:4] == b"\xff\xff\xff\xff" or tail[-8:] == b"\xff\xff\xff\xff\0\0\0\0"
        raise ValueError(
            "it is an Arrow stream, which has no footer; write pyarrow.ipc.new_file or Feather, or, of Hugging Face's, "
            "give the folder of save_to_disk"
            if stream
            else "it does not end as an Arrow file does"
        )
    return int.from_bytes(tail[-10:-6], "little") + 10


def _blocks(footer: bytes) -> list[Block]:
    """Return where the record batches of a file lie."""
    try:
        table = _follow(footer, 0)
        place = _field(footer, table, _BATCHES)
        if place is None:
            return []
        vector = _follow(footer, place)
        (count,) = struct.unpack_from("<I", footer, vector)
        return [struct.unpack_from("<qi4xq", footer, vector + 4 + 24 * i) for i in range(count)]
    except struct.error:
        raise ValueError("its footer is cut off") from None


def _rows(header: bytes) -> int:
    """Return the number of rows of a record batch, from its header."""
    try:
        content = header[8:] if header[:4] == b"\xff\xff\xff\xff" else header[4:]
        message = _follow(content, 0)
        place = _field(content, message, _HEADER)
        batch = _follow(content, place if place is not None else len(content))
        length = _field(content, batch, _LENGTH)
        return struct.unpack_from("<q", content, length)[0] if length is not None else 0
    except struct.error:
        raise ValueError("the header of a record batch is cut off") from None


def _follow(content: bytes, place: int) -> int:
    return place + struct.unpack_from("<I", content, place)[0]


def _field(content: bytes, table: int, number: int) -> int | None:
    """Return where a field of a flatbuffer's table lies, or None if it has its default."""
    vtable = table - struct.unpack_from("<i", content, table)[0]
    (size,) = struct.unpack_from("<H", content, vtable)
    place = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", content, vtable + place) if place < size else (0,)
    return table + offset if offset else None
