"""The shared conformance suite of sources, on everything that `--data` takes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
import zarr
from torch.utils.data import TensorDataset

from laplace_dist.testing.source_conformance import SourceConformance
from laplace_dist.testing.table_conformance import TableConformance

datasets.disable_progress_bars()
CHUNK = 7


def table(columns) -> pa.Table:
    """Return columns as an Arrow table: arrays of more than one dimension as nested fixed-size lists."""
    return pa.table({name: arrow(values) for name, values in columns.items()})


def arrow(values):
    if not isinstance(values, np.ndarray):
        return pa.array(values if values and isinstance(values[0], str | float) else [list(v) for v in values])
    array = pa.array(values.reshape(-1))
    for size in values.shape[:0:-1]:
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def split_up(columns) -> list[pa.Table]:
    """Return two tables, the first of two thirds of the rows, as so many files."""
    whole = table(columns)
    cut = 2 * len(whole) // 3
    return [part for part in (whole.slice(0, cut), whole.slice(cut)) if len(part)] or [whole]


class TestMapStyle(SourceConformance):
    copies = False

    def write(self, folder, split, columns):
        np.savez(f"{folder}/{split}.npz", **columns)

    def load(self, folder, split="train", **settings):
        return super().load("test_source_conformance:arrays", split, data_args={"folder": folder}, **settings)

    # Which splits there are only the user's callable knows.
    test_a_split_that_is_not_there_is_refused = None


def arrays(split, folder):
    found = np.load(f"{folder}/{split}.npz")
    return TensorDataset(torch.tensor(found["x"]), torch.tensor(found["y"]))


class TestZarr(SourceConformance):
    """Zarr has checksums and names of its own: see test_data."""

    def write(self, folder, split, columns):
        group = zarr.open_group(folder, mode="a")
        for name, values in columns.items():
            group.create_array(f"{split}/{name}", data=values, chunks=(CHUNK, *values.shape[1:]))


class TestParquet(TableConformance):
    def write(self, folder, split, columns):
        (Path(folder) / split).mkdir()
        for number, part in enumerate(split_up(columns)):
            pa.parquet.write_table(part, f"{folder}/{split}/part é[{number}].parquet", row_group_size=CHUNK)


class TestParquetOfOneFile(TableConformance):
    def write(self, folder, split, columns):
        pa.parquet.write_table(table(columns), f"{folder}/{split}.parquet", row_group_size=CHUNK, compression="none")


class TestArrow(TableConformance):
    def write(self, folder, split, columns):
        parts = split_up(columns)
        for number, part in enumerate(parts):
            name = f"{folder}/{split}-{number:05d}-of-{len(parts):05d}.arrow"
            with pa.ipc.new_file(name, part.schema) as file:
                for batch in part.to_batches(max_chunksize=CHUNK):
                    file.write_batch(batch)


class TestFeather(TableConformance):
    def write(self, folder, split, columns):
        pa.feather.write_feather(table(columns), f"{folder}/{split}.feather", compression="zstd", chunksize=CHUNK)


class TestSavedDataset(TableConformance):
    def write(self, folder, split, columns):
        datasets.Dataset(table(columns)).save_to_disk(f"{folder}/{split}")

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr("laplace_dist.data.hugging_face._ROWS", CHUNK)

    def files(self, folder, split):
        return sorted((Path(folder) / split).glob("*.arrow"))

    def name_of(self, file):
        return "train"


class TestTar(TableConformance):
    def write(self, folder, split, columns):
        (Path(folder) / split).mkdir()
        n = len(columns["y"])
        for number, rows in enumerate((range(2 * n // 3), range(2 * n // 3, n))):
            with tarfile.open(f"{folder}/{split}/{number:06d}.tar", "w") as tar:
                for row in rows:
                    for name, values in columns.items():
                        if values[row] is not None:
                            ending, content = member(name, values[row])
                            info = tarfile.TarInfo(f"{row:05d}.{name}.{ending}")
                            info.size = len(content)
                            tar.addfile(info, io.BytesIO(content))

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr("laplace_dist.data.tar_shards.MOST", CHUNK)


def member(name, value):
    if isinstance(value, str):
        return "txt", value.encode()
    if name == "y":
        return "cls", str(value).encode()
    content = io.BytesIO()
    np.save(content, value)
    return "npy", content.getvalue()


def test_the_suite_covers_the_kinds_that_there_are():
    from laplace_dist.data import sources

    assert {"parquet", "arrow", "tar"} == set(sources._FILES)
