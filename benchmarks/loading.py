"""Reading ahead: data that take Python time beside a device that takes its own.

    python benchmarks/loading.py

2,400 examples of 2 ms each in Python and 0.1 s of a device's time for each of 8 batches; both are pauses, so that two cores
suffice to see what overlaps. Rows: reading and computing in turn, torch's own `DataLoader` with forked processes, and what a
worker of a job does, in the first segment, which starts the processes, and in the next one, which finds them there. Then the
time per batch of Zarr data whose chunks hold many batches, read as they come and by chunk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable

import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from laplace_dist.data.loader import batches
from laplace_dist.data.read_ahead import ReadAhead
from laplace_dist.data.zarr_split import ZarrSplit

EXAMPLES, BATCH, PYTHON, DEVICE = 2_400, 300, 0.002, 0.1


class Slow(Dataset):
    """Examples that take their time."""

    def __len__(self) -> int:
        return 2 * EXAMPLES

    def __getitem__(self, index: int):
        time.sleep(PYTHON)
        return torch.zeros(16), index % 10


def seconds(found: Iterable) -> float:
    """Seconds to take every batch and wait for the device."""
    start = time.perf_counter()
    for _ in found:
        time.sleep(DEVICE)
    return time.perf_counter() - start


def slow_data(processes: int) -> None:
    """Print the rows of slow data."""
    print(f"device alone: {seconds(range(EXAMPLES // BATCH)):.2f} s")
    print(f"one after the other: {seconds(batches(Slow(), 0, EXAMPLES, BATCH)):.2f} s")
    half = torch.utils.data.Subset(Slow(), range(EXAMPLES))
    print(f"torch's DataLoader, {processes} processes: {seconds(DataLoader(half, BATCH, num_workers=processes)):.2f} s")
    ahead = ReadAhead(Slow(), BATCH, workers=processes)
    for name, start in (("first segment", 0), ("next segment", EXAMPLES)):
        print(f"--loader-workers {processes}, {name}: {seconds(ahead.batches(start, start + EXAMPLES)):.2f} s")
    ahead.close()


def zarr_data() -> None:
    """Print the rows of Zarr data: 64 batches of 32 images in two compressed chunks of 1,024."""
    with tempfile.TemporaryDirectory() as folder:
        x = np.random.default_rng(0).standard_normal((2048, 3, 32, 32), dtype=np.float32)
        group = zarr.create_group(folder)
        group.create_array("train/x", data=x, chunks=(1024, 3, 32, 32))
        group.create_array("train/y", data=np.zeros(2048, np.int64), chunks=(1024,))
        array, labels = group["train/x"], group["train/y"]
        start = time.perf_counter()
        for offset in range(0, 2048, 32):
            torch.from_numpy(array[offset : offset + 32]), torch.from_numpy(labels[offset : offset + 32])
        before = time.perf_counter() - start
        start = time.perf_counter()
        list(batches(ZarrSplit(folder, "train"), 0, 2048, 32))
        after = time.perf_counter() - start
    print(f"Zarr, as batches come: {before / 64 * 1e3:.1f} ms per batch; by chunk: {after / 64 * 1e3:.1f} ms per batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    slow_data(parser.parse_args().processes)
    zarr_data()


if __name__ == "__main__":
    main()
