"""Cost of the distributed map phase: one worker against a bare ``la.fit``, and two workers against one.

    python benchmarks/map_phase.py

60,000 random examples of MNIST's size, a CNN of about 60,000 parameters, exact-GGN Kron, one thread per worker. Starting Ray
is not counted; starting the worker's process, importing torch and loading the model are. Every time is of a process or
an actor of its own, and the variants take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLES, BATCH = 60_000, 256


def network() -> nn.Module:
    """A CNN of 59,904 parameters with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 49, 42),
        nn.ReLU(),
        nn.Linear(42, 10),
    )


def examples(split: str, n: int = EXAMPLES) -> TensorDataset:
    """Random images and labels, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 1, 28, 28, generator=generator), torch.randint(0, 10, (n,), generator=generator))


def bare_fit(n: int) -> float:
    """Seconds of ``la.fit`` in this process, from an existing data set, with one thread."""
    from laplace import Laplace

    torch.set_num_threads(1)
    data = examples("train", n)
    start = time.perf_counter()
    la = Laplace(network().eval(), "classification", "all", "kron")
    la.fit(DataLoader(data, batch_size=BATCH))
    return time.perf_counter() - start


def map_phase(n: int, workers: int) -> float:
    """Seconds from the first task of the map phase to the last commit, with Ray already running."""
    from laplace_dist.config.settings import Config
    from laplace_dist.job import Job

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model="map_phase:network",
            data="map_phase:examples",
            data_args={"n": n},
            checkpoint=str(Path(folder) / "run"),
            batch_size=BATCH,
            num_workers=workers,
            ray_address="local",
        )
        with Job(config, say=lambda text: None) as job:
            job.open()
            job.session.executor.connect()
            start = time.perf_counter()
            job.map()
            return time.perf_counter() - start


def bare(n: int) -> float:
    """Run :func:`bare_fit` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(bare_fit, n).result()


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"bare la.fit": [], "1 worker": [], "2 workers": []}
    for _ in range(arguments.turns):
        times["bare la.fit"].append(bare(arguments.examples))
        times["1 worker"].append(map_phase(arguments.examples, 1))
        times["2 workers"].append(map_phase(arguments.examples, 2))
        print({name: round(values[-1], 2) for name, values in times.items()}, flush=True)
    for name, values in times.items():
        print(f"{name:12} {statistics.median(values):7.2f} s  (min {min(values):.2f}, max {max(values):.2f})")
    overhead = [w / b for w, b in zip(times["1 worker"], times["bare la.fit"], strict=True)]
    scaling = [one / two for one, two in zip(times["1 worker"], times["2 workers"], strict=True)]
    print(f"1 worker / bare la.fit: {statistics.median(overhead):.3f}")
    print(f"1 worker / 2 workers:   {statistics.median(scaling):.3f}")


if __name__ == "__main__":
    main()
