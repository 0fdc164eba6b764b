"""Peak memory of the driver and of a worker against the number of segments and the size of the factors.

    python benchmarks/memory.py

Each row is a process of its own: ``fit`` with two workers for the driver; one worker, without Ray, that accumulates and commits
one segment. The Kron factor of the wide layer has 4096² entries (64 MB in float32), its weight 4096 × 4.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import Dataset

VARIANTS = {
    "8 segments, 64²": (64, 8),
    "512 segments, 64²": (64, 512),
    "8 segments, 4096²": (4096, 8),
    "8 segments, 8192²": (8192, 8),
}


class Generated(Dataset):
    """Examples made when they are asked for, so that the data set itself takes no memory."""

    def __init__(self, width: int, n: int):
        self.width, self.n = width, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        if not 0 <= index < self.n:
            raise IndexError(index)
        return torch.randn(self.width, generator=torch.Generator().manual_seed(index)), torch.tensor(index % 4)


def examples(split: str, width: int, n: int) -> Generated:
    """A split of the generated data."""
    return Generated(width, n)


def network(width: int) -> nn.Module:
    """One wide linear layer, so that the factor is large and the model small."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4))


def one(role: str, width: int, segments: int) -> None:
    """Carry out one row in this process and print its peak memory in MB."""
    from laplace_dist.config.settings import Config
    from laplace_dist.job import Job, fit

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model="memory:network",
            model_args={"width": width},
            data="memory:examples",
            data_args={"width": width, "n": 8 * segments},
            checkpoint=f"{folder}/run",
            batch_size=8,
            segment_size=8,
            num_workers=2,
            ray_address="local",
            skip_tune=True,
            skip_evaluate=True,
        )
        if role == "driver":
            fit(config)
        else:
            from laplace_dist.execution.worker import Worker
            from laplace_dist.stages.map import MapSegment

            with Job(config) as job:
                job.open()
                worker = Worker(job.config, [], ".", False)
                worker.start()
                for segment in job.plan.segments[:4]:
                    worker.run(MapSegment(job.plan.digest, segment))
    print(f"PEAK {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.1f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs=3, metavar=("ROLE", "WIDTH", "SEGMENTS"))
    arguments = parser.parse_args()
    if arguments.row:
        one(arguments.row[0], int(arguments.row[1]), int(arguments.row[2]))
        return
    for role in ("driver", "worker"):
        for name, (width, segments) in VARIANTS.items():
            command = [sys.executable, "-W", "ignore", __file__, "--row", role, str(width), str(segments)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"{role:7} {name:18} {output.rsplit('PEAK ', 1)[1].strip():>8} MB", flush=True)


if __name__ == "__main__":
    main()
