"""Peak memory of loading a posterior against what the loaded posterior holds.

    python benchmarks/loading.py

A Kron posterior with five factors of 2800² entries, 314 MB in float64, is fitted once and loaded by a process of its own for
each row: without the eigendecompositions of its factors, and with them. The peak is above what the process holds just before,
the model included. A loaded posterior holds its sums in float64, the factors in the model's type, and the eigenvectors.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

WIDTH = 2800
ROWS = {"without decompositions": 0, "with decompositions": 1}


def network() -> nn.Module:
    """Two square layers and a head."""
    torch.manual_seed(0)
    square = (nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return nn.Sequential(*square, nn.Linear(WIDTH, 4))


def examples(split: str) -> Dataset:
    """Sixteen examples, which is all that it takes to have factors."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(16, WIDTH, generator=generator), torch.arange(16) % 4)


def held(found: Any, seen: set[int] | None = None, depth: int = 6) -> dict[int, int]:
    """Bytes of every storage that an object reaches through attributes and containers, by its address."""
    seen = set() if seen is None else seen
    if id(found) in seen or depth == 0 or isinstance(found, nn.Module):
        return {}
    seen.add(id(found))
    if isinstance(found, Tensor):
        return {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()}
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    parts = [*parts, *getattr(found, "__dict__", {}).values()]
    return {place: size for part in parts for place, size in held(part, seen, depth - 1).items()}


def status(field: str) -> float:
    """A line of this process's status, in MB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def load(url: str) -> None:
    """Load the posterior in this process and print its peak and what is held."""
    import laplace_dist

    model = network()
    laplace_dist.status(url)
    before = status("VmRSS")
    la = laplace_dist.load_posterior(url, model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    bytes_ = sum(size for place, size in held(la).items() if place not in weights)
    print(f"ROW {status('VmHWM') - before:.0f} {bytes_ / 2**20:.0f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", metavar="URL")
    url = parser.parse_args().row
    if url is not None:
        load(url)
        return
    from laplace_dist import Inline
    from laplace_dist.config.settings import Config
    from laplace_dist.job import Job

    with tempfile.TemporaryDirectory() as folder:
        url = f"{folder}/run"
        config = Config(
            model="loading:network", data="loading:examples", checkpoint=url, batch_size=16, estimator="ggn"
        )
        with Job(config, Inline) as job:
            job.open()
            job.map()
            version = job.reduce()
            for name, decomposed in ROWS.items():
                if decomposed:
                    job.decompose(version)
                command = [sys.executable, "-W", "ignore", __file__, "--row", url]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peak, own = (int(word) for word in output.rsplit("ROW ", 1)[1].split())
                print(f"{name:23} peak {peak:5} MB   held {own:5} MB   {peak / own:.2f}", flush=True)


if __name__ == "__main__":
    main()
