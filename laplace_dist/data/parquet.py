"""Parquet files: chunks are row groups, of which only the columns that are used are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from laplace_dist.data.files import File
from laplace_dist.data.sparse import Sparse
from laplace_dist.data.table_files import Described, TableFiles, tail_of


class ParquetFiles(TableFiles):
    """Rows of Parquet files. Checksums of pages are verified where the writer has put some."""

    def _describe(self, file: File, tail: bytes) -> Described:
        if tail[-4:] == b"PARE":
            raise ValueError("its footer is encrypted, which is not supported")
        if tail[-4:] != b"PAR1":
            raise ValueError("it does not end as a Parquet file does")
        footer = tail_of(self._place, file, tail, int.from_bytes(tail[-8:-4], "little") + 8)
        metadata = pq.read_metadata(pa.BufferReader(footer))
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return Described(metadata.schema.to_arrow_schema(), counts, len(footer), hashlib.sha256(footer).digest())

    def _reader(self, file: File, footer: bytes) -> tuple[File, bytes, Any]:
        return file, footer, pq.read_metadata(pa.BufferReader(footer))

    def _table(self, reader: tuple[File, bytes, Any], chunk: int, names: Sequence[str]) -> pa.Table:
        file, footer, metadata = reader
        content = Sparse(self._place, file, [(file.size - len(footer), footer)])
        content.fetch(_ranges(metadata.row_group(chunk), names))
        with pq.ParquetFile(content, metadata=metadata, page_checksum_verification=True) as parquet:
            return parquet.read_row_group(chunk, columns=list(names), use_threads=False).select(list(names))


def _ranges(group: Any, names: Sequence[str]) -> list[tuple[int, int]]:
    """Return where the columns of a row group lie in the file."""
    found = []
    for place in range(group.num_columns):
        column = group.column(place)
        path = column.path_in_schema
        if any(path == name or path.startswith(f"{name}.") for name in names):
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            found.append((start, start + column.total_compressed_size))
    return found
