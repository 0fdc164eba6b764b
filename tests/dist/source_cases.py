"""Tables, tar shards and a file system that counts, for the tests of data in files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.memory import MemoryFileSystem

from laplace_dist.config.settings import Config
from laplace_dist.data.sources import load_split


def load(folder, split="train", **settings):
    return load_split(Config(**{"model": "m:f", "data": str(folder), "checkpoint": "unused", **settings}), split)


def table(n=20, **more) -> pa.Table:
    """Return columns `x` of pairs, `y`, and others."""
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2.0 * n, dtype=np.float32)), 2)
    return pa.table({"x": x, "y": np.arange(n) % 3, **more})


def write(path, content: pa.Table, rows=5, **options) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=rows, **options)
    return path


def raw_bytes(values: torch.Tensor) -> pa.Table:
    """Return tensors as a column of their bytes, whose schema says what they are."""
    rows = [value.numpy().tobytes() for value in values]
    form = {"dtype": str(values.numpy().dtype), "shape": str(list(values.shape[1:]))}
    return pa.table([pa.array(rows, pa.binary())], schema=pa.schema([pa.field("x", pa.binary(), metadata=form)]))


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def npy(value) -> bytes:
    content = io.BytesIO()
    np.save(content, value)
    return content.getvalue()


def shard(path, rows=range(8), **kinds) -> Path:
    """Write a tar shard of examples `x.npy`, `y.cls` and what else is given: a function of the row by ending."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row in rows:
            add(tar, f"{row:06d}.x.npy", npy(np.full(2, row, np.float32)))
            add(tar, f"{row:06d}.y.cls", str(row % 3).encode())
            for ending, make in kinds.items():
                add(tar, f"{row:06d}.{ending}", make(row))
    return path


class Counting(MemoryFileSystem):
    """Files in memory; notes every byte range that is read, and every file that is opened."""

    protocol = "counting"
    store: dict = {}
    pseudo_dirs = [""]
    read: list = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix(f"{cls.protocol}://"))

    def cat_file(self, path, start=None, end=None, **options):
        content = super().cat_file(path, start, end, **options)
        type(self).read.append((path.rpartition("/")[2], start or 0, len(content)))
        return content

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            type(self).read.append((path.rpartition("/")[2], "opened", 0))
        return super()._open(path, mode, **options)


fsspec.register_implementation("counting", Counting, clobber=True)


def counted(*paths, split="train") -> str:
    """Copy files to a folder of the counting file system and return its URL; what was read before is forgotten."""
    Counting.store.clear()
    fs = Counting()
    for path in paths:
        fs.pipe_file(f"/set/{split}/{Path(path).name}", Path(path).read_bytes())
    Counting.read.clear()
    return "counting:///set"


class Many(Counting):
    """A folder of very many names that all have the content of one file."""

    protocol = "many"
    content, count = b"", 0

    def _entry(self, path):
        return {"name": path, "size": len(self.content), "type": "file", "created": 0}

    def ls(self, path, detail=True, **options):
        if path.rstrip("/").endswith("/train"):
            return [self._entry(f"/set/train/{i:05d}.parquet") for i in range(self.count)]
        return [{"name": "/set/train", "size": 0, "type": "directory"}]

    def find(self, path, detail=False, **options):
        return {entry["name"]: entry for entry in self.ls(path)}

    def info(self, path, **options):
        if not path.endswith(".parquet"):
            raise FileNotFoundError(path)
        return self._entry(path)

    def exists(self, path, **options):
        return path.endswith(".parquet")

    def cat_file(self, path, start=None, end=None, **options):
        content = self.content[start:end]
        Counting.read.append((path.rpartition("/")[2], start or 0, len(content)))
        return content


fsspec.register_implementation("many", Many, clobber=True)
