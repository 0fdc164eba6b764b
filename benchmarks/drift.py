"""Rounding errors of summed curvature over MNIST: float32 models against float64 at the same weights.

    python benchmarks/drift.py --data FOLDER/OF/IDX/FILES

A classifier that has become confident contributes very little per example, which is what a running sum in float32 loses.
600,000 examples are ten passes over the training images; their exact sum is ten times that of one pass.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from laplace import Laplace
from laplace.curvature import backend_class

PASSES = (1, 10)
FITS = (("kron", "all"), ("diag", "all"), ("full", "last_layer"))


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """Training images ``(60000, 784)`` in [0, 1], and labels."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(x / np.float32(255)), torch.from_numpy(y.astype(np.int64))


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """MLP 784-32-10 after some epochs of Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model


def sums(model: nn.Module, x: Tensor, y: Tensor, structure: str, subset: str, backend: str, passes: int, batch: int):
    """Every summed factor by name."""
    cls, kwargs = backend_class(backend, "ggn")
    la = Laplace(model, "classification", subset, structure, backend=cls, backend_kwargs=kwargs)
    la.fit([(a, b) for _ in range(passes) for a, b in zip(x.split(batch), y.split(batch), strict=True)])
    return {name: value.double() for name, value in la.sums.tensors.items()}


def main() -> None:
    """Print one line per structure, backend and number of examples: the largest relative error of any factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="*", default=[256, 60_000])
    parser.add_argument("--backends", nargs="*", default=["native", "curvlinops"])
    arguments = parser.parse_args()
    x, y = images(arguments.data)
    model = trained(x, y, arguments.epochs)
    with torch.no_grad():
        sure = model(x).softmax(-1).amax(-1)
    print(f"median of 1 - largest probability: {float((1 - sure.double()).median()):.1e}")
    print("| structure | backend | batch | examples | error | factor |\n| --- | --- | --- | --- | --- | --- |")
    for structure, subset in FITS:
        exact = sums(model.double(), x.double(), y, structure, subset, "native", 1, 1000)
        model.float()
        for backend in arguments.backends:
            for batch in arguments.batches:
                for passes in PASSES:
                    found = sums(model, x, y, structure, subset, backend, passes, batch)
                    errors = {k: float((v / passes - exact[k]).norm() / exact[k].norm()) for k, v in found.items()}
                    worst = max(errors, key=errors.__getitem__)
                    n = f"{passes * len(x):,}"
                    print(f"| {structure} | {backend} | {batch} | {n} | {errors[worst]:.1e} | {worst} |", flush=True)


if __name__ == "__main__":
    main()
