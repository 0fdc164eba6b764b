"""A file system that fails once, at any operation, while data on it are opened and read: never taken for wrong settings."""

from __future__ import annotations

from contextlib import suppress

import datasets
import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from source_cases import load, shard, table, write

from laplace_dist.data.loader import batches
from laplace_dist.data.sources import read_file
from laplace_dist.errors import ExampleError, SettingsError, StorageError

datasets.disable_progress_bars()


class Failing(MemoryFileSystem):
    """Files in memory; the operation with the number `at` times out."""

    protocol = "failing"
    store: dict = {}
    pseudo_dirs = [""]
    count, at = 0, None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("failing://"))

    def _count(self):
        cls, number = type(self), type(self).count
        cls.count += 1
        if number == cls.at:
            raise TimeoutError("no answer")

    def ls(self, path, detail=True, **options):
        self._count()
        return super().ls(path, detail, **options)

    def info(self, path, **options):
        self._count()
        return super().info(path, **options)

    def cat_file(self, path, start=None, end=None, **options):
        self._count()
        return super().cat_file(path, start, end, **options)

    def _open(self, path, mode="rb", **options):
        self._count()
        return super()._open(path, mode, **options)


fsspec.register_implementation("failing", Failing, clobber=True)


def _parquet(folder):
    write(folder / "train" / "0.parquet", table(12))


def _saved(folder):
    datasets.Dataset(table(12)).save_to_disk(folder / "train")


def _tar(folder):
    shard(folder / "train" / "0.tar", range(12))


def _zarr(folder):
    group = zarr.open_group(folder, mode="w").create_group("train")
    for name, values in (("x", np.ones((12, 2), np.float32)), ("y", np.arange(12) % 3)):
        group.create_array(name, data=values, chunks=(5, *values.shape[1:]))


@pytest.fixture(params=[_parquet, _saved, _tar, _zarr])
def url(request, tmp_path):
    """One kind of data on the file system that fails."""
    request.param(tmp_path / "set")
    Failing.store.clear()
    Failing.at = None
    Failing().put(str(tmp_path / "set"), "/", recursive=True)
    return "failing:///set"


def _read(url):
    dataset = load(url)
    assert [len(y) for _, _, y in batches(dataset, 0, 12, 5)] == [5, 5, 2]


def test_an_outage_at_any_operation_is_one_and_no_wrong_setting(url):
    Failing.count = 0
    _read(url)
    count = Failing.count
    assert count > 2
    for at in range(count):
        Failing.count, Failing.at = 0, at
        with suppress(StorageError, OSError, ExampleError):  # some packages ask again, or go on without what they asked
            _read(url)
    Failing.at = None
    _read(url)


def test_a_file_of_weights_that_times_out_is_an_outage():
    Failing.store.clear()
    Failing.at = None
    Failing().pipe_file("/w.safetensors", b"content")
    Failing.count, Failing.at = 0, 0
    with pytest.raises(
        StorageError, match="--weights: cannot read 'failing:///w.safetensors' .TimeoutError: no answer"
    ):
        read_file("failing:///w.safetensors", {}, "--weights")
    Failing.at = None
    with pytest.raises(SettingsError, match="cannot read 'failing:///none' .FileNotFoundError"):
        read_file("failing:///none", {}, "--weights")
