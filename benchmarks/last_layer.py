"""Fit and predictive of a last layer with many classes, and the memory that they take; run with another checkout in PYTHONPATH.

python benchmarks/last_layer.py --classes 1000 --inputs 32
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import nn

from laplace import Laplace


def measure(call, repeats: int) -> float:
    """Median time in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--structure", default="kron")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, options.features), nn.ReLU(), nn.Linear(options.features, options.classes))
    x, y = torch.randn(options.inputs, 16), torch.randint(options.classes, (options.inputs,))
    la = Laplace(model, "classification", "last_layer", options.structure)
    fit = measure(lambda: la.fit([(x, y)]), options.repeats)
    la(x[:1])  # the eigendecomposition
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    predict = measure(lambda: la(x), options.repeats)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{options.structure}: fit of one batch {fit:.4f} s, predictive {predict:.4f} s, +{more / 1024:.0f} MB at its peak"
    )


if __name__ == "__main__":
    main()
