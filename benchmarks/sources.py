"""Data in files: what a plan of 10⁸ rows costs, and how fast batches come out of each kind.

    python benchmarks/sources.py

First 100 Parquet files of 10⁶ rows each, by a file system that hands out the same bytes under a hundred names: requests, bytes,
peak memory and time from the URL to the plan. Then rows per second of the same 32 × 32 colour images in every kind of file,
from the page cache, in one process, best of three passes.
"""

from __future__ import annotations

import argparse
import io
import pickle
import resource
import tarfile
import tempfile
import time
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from fsspec.implementations.memory import MemoryFileSystem

from laplace_dist.config.settings import Config
from laplace_dist.data.loader import batches
from laplace_dist.data.sources import load_split
from laplace_dist.plan.identity import fingerprint
from laplace_dist.plan.plan import build_plan
from laplace_dist.storage.sealed_json import seal_json

FILES, ROWS, GROUP = 100, 10**6, 10**5
IMAGES, BATCH = 8_192, 256


class Many(MemoryFileSystem):
    """A folder of very many names that all have the content of one file."""

    protocol, content, reads = "manyfiles", b"", []

    def _entry(self, path: str) -> dict:
        return {"name": path, "size": len(self.content), "type": "file"}

    def ls(self, path: str, detail: bool = True, **options):
        """Return the one folder, or its files."""
        if path.endswith("/train"):
            return [self._entry(f"/set/train/{i:05d}.parquet") for i in range(FILES)]
        return [{"name": "/set/train", "size": 0, "type": "directory"}]

    def find(self, path: str, detail: bool = False, **options):
        """Return the files."""
        return {entry["name"]: entry for entry in self.ls("/set/train")}

    def info(self, path: str, **options):
        """Return what is known of a file."""
        return self._entry(path)

    def exists(self, path: str, **options):
        """Say whether it is one of the files."""
        return path.endswith(".parquet")

    def cat_file(self, path: str, start=None, end=None, **options):
        """Return a range of bytes, and note how many."""
        content = self.content[start:end]
        self.reads.append(len(content))
        return content


def load(url: str):
    return load_split(Config(model="m:f", data=url, checkpoint="unused"), "train")


def planned() -> None:
    """Print what a plan of 10⁸ rows costs."""
    sink, column = io.BytesIO(), np.arange(ROWS, dtype=np.int8) % 10
    pq.write_table(pa.table({"x": column, "y": column}), sink, row_group_size=GROUP)
    Many.content = sink.getvalue()
    fsspec.register_implementation("manyfiles", Many)
    spec = {"factors": {"w": {"shape": [2, 2], "symmetric": True}}}
    settings = {"batch_size": BATCH, "segment_size": None}
    found = measured(settings, spec)
    Many.reads.clear()
    tracemalloc.start()
    dataset, _, content, _ = measured(settings, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{len(dataset):,} rows in {FILES} files, {len(Many.reads)} reads of {sum(Many.reads) / 2**20:.1f} MB in all")
    print(f"plan of {len(content) / 1e3:.0f} kB; sent to a process: {len(pickle.dumps(dataset)) / 1e3:.0f} kB")
    print(f"peak of Python's memory {peak / 2**20:.1f} MB")
    print("open {:.2f} s, fingerprint {:.2f} s, plan {:.2f} s".format(*found[-1]))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"largest size of the process {largest:.0f} MB, with torch and pyarrow")


def measured(settings: dict, spec: dict) -> tuple:
    """Open the data, take their fingerprint and plan; return what came of it and the seconds of each."""
    begun = time.perf_counter()
    dataset = load("manyfiles:///set")
    opened = time.perf_counter()
    found = fingerprint(dataset)
    looked = time.perf_counter()
    plan = build_plan(settings, data=found, weights="w", model={"path": "m:f", "args": {}}, spec=spec)
    content = seal_json(plan.to_values())
    return dataset, found, content, (opened - begun, looked - opened, time.perf_counter() - looked)


def written(folder: Path) -> dict[str, str]:
    """Write the same images in every kind of file."""
    x = np.random.default_rng(0).integers(0, 255, (IMAGES, 3, 32, 32), np.uint8)
    y = np.arange(IMAGES) % 10
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 3 * 32 * 32)
    form = pa.field("x", pa.binary(), metadata={"dtype": "uint8", "shape": "[3, 32, 32]"})
    raw = pa.array([row.tobytes() for row in x], pa.binary())
    for name, table in (
        ("Parquet, lists", pa.table({"x": flat, "y": y})),
        ("Parquet, bytes", pa.table([raw, pa.array(y)], schema=pa.schema([form, ("y", pa.int64())]))),
    ):
        (folder / name).mkdir()
        pq.write_table(table, folder / name / "train.parquet", row_group_size=1024)
    (folder / "Arrow").mkdir()
    with pa.ipc.new_file(folder / "Arrow" / "train.arrow", table.schema) as file:
        for batch in table.to_batches(max_chunksize=1024):
            file.write_batch(batch)
    group = zarr.create_group(folder / "Zarr")
    group.create_array("train/x", data=x, chunks=(1024, 3, 32, 32))
    group.create_array("train/y", data=y, chunks=(1024,))
    (folder / "tar").mkdir()
    with tarfile.open(folder / "tar" / "train-0.tar", "w") as tar:
        for row in range(IMAGES):
            array = io.BytesIO()
            np.save(array, x[row])
            for ending, content in (("x.npy", array.getvalue()), ("y.cls", str(y[row]).encode())):
                info = tarfile.TarInfo(f"{row:06d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return {path.name: str(path) for path in sorted(folder.iterdir())}


def rates() -> None:
    """Print rows per second of every kind."""
    with tempfile.TemporaryDirectory() as folder:
        for name, url in written(Path(folder)).items():
            begun = time.perf_counter()
            dataset = load(url)
            opened = time.perf_counter() - begun
            best = float("inf")
            for _ in range(3):
                begun = time.perf_counter()
                for _ in batches(dataset, 0, IMAGES, BATCH):
                    pass
                best = min(best, time.perf_counter() - begun)
            print(
                f"{name}: opened in {opened:.3f} s, {IMAGES / best:,.0f} rows/s, {IMAGES * 3072 / best / 1e6:,.0f} MB/s"
            )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    planned()
    rates()
