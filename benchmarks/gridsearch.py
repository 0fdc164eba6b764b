"""Grid search of the prior precision on Fashion-MNIST, side by side with laplace-torch 0.3 as a black box.

    python benchmarks/gridsearch.py --data FOLDER/OF/IDX/FILES --peer-python PATH/TO/PEER/ENV/bin/python

Trains a small convolutional network on 10,000 images until it is overconfident, gives its weights to both libraries, lets each
fit a Kronecker-factored last layer and search the same grid on the same validation images, and prints what was chosen and what
that gives on the test images. The last row sets our posterior to the value whose average over all values *tried so far* is the
lowest, which is what a running metric gives that is never reset: where it meets the peer's choice, that is the reason for it.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

_ROOT = Path(__file__).resolve().parents[1]
_TRAINING, _VALIDATION = 10_000, 5000  # the first and the last images of the training set


def read_idx(path: Path) -> torch.Tensor:
    """An array of an IDX file."""
    with gzip.open(path) as file:
        raw = file.read()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())


def images(folder: str, split: str) -> TensorDataset:
    """Images and labels of ``train``, ``val`` or ``test``."""
    part = "t10k" if split == "test" else "train"
    x = read_idx(Path(folder) / f"{part}-images-idx3-ubyte.gz")[:, None].float() / 255
    y = read_idx(Path(folder) / f"{part}-labels-idx1-ubyte.gz").long()
    rows = {"train": slice(_TRAINING), "val": slice(-_VALIDATION, None), "test": slice(None)}[split]
    return TensorDataset(x[rows], y[rows])


def network() -> nn.Module:
    """Two convolutions and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(folder: str, epochs: int) -> dict[str, torch.Tensor]:
    """Weights after some epochs of Adam."""
    model, (x, y) = network(), images(folder, "train").tensors
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.state_dict()


def search(folder: str, weights: dict[str, torch.Tensor], grid_size: int) -> dict:
    """Fit, search and predict with whichever library this interpreter has, through documented names alone."""
    from laplace import Laplace

    model = network()
    model.load_state_dict(weights)
    la = Laplace(model.eval(), "classification", subset_of_weights="last_layer", hessian_structure="kron")
    la.fit(DataLoader(images(folder, "train"), batch_size=500))
    start = time.perf_counter()
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=DataLoader(images(folder, "val"), batch_size=500),
        grid_size=grid_size,
        pred_type="glm",
        link_approx="probit",
    )
    seconds = time.perf_counter() - start
    chosen = float(la.prior_precision.reshape(-1)[0])
    return {"chosen": chosen, "seconds": seconds, "probs": predictions(la, folder)}


def predictions(predictor, folder: str) -> torch.Tensor:
    """Probabilities of the test images."""
    with torch.no_grad():
        parts = [predictor(x) for x, _ in DataLoader(images(folder, "test"), batch_size=500)]
    return torch.cat(parts).double()


def never_reset(folder: str, weights: dict[str, torch.Tensor], grid_size: int) -> tuple[float, torch.Tensor]:
    """The choice by averages over all values tried so far, and the predictions that it gives."""
    from laplace import Laplace
    from laplace.tuning import prior_precision_grid, score_grid

    model = network()
    model.load_state_dict(weights)
    la = Laplace(model.eval(), "classification", subset_of_weights="last_layer", hessian_structure="kron")
    la.fit(DataLoader(images(folder, "train"), batch_size=500))
    grid = prior_precision_grid(-4, 4, grid_size)
    total, _ = score_grid(la, DataLoader(images(folder, "val"), batch_size=500), grid)
    la.prior_precision = grid[(total.cumsum(0) / torch.arange(1, grid_size + 1)).argmin()]
    return float(la.prior_precision), predictions(la, folder)


def row(name: str, chosen: str, probs: torch.Tensor, y: torch.Tensor) -> str:
    """One line of the table."""
    from laplace.utils.metrics import classification_scores, summarize_classification

    found = summarize_classification(classification_scores(probs, y))
    return f"| {name} | {chosen} | {found['accuracy']:.4f} | {found['nll']:.4f} | {found['ece']:.4f} |"


def main() -> None:
    """Train, search on both sides, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the four gzipped IDX files")
    parser.add_argument("--peer-python", help="interpreter of the environment with laplace-torch")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--grid-size", type=int, default=33)
    parser.add_argument("--weights", type=Path, help="where trained weights are, or are to be left for another time")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.side:
        weights = torch.load(Path(arguments.side) / "weights.pt", weights_only=True)
        torch.save(search(arguments.data, weights, arguments.grid_size), Path(arguments.side) / "found.pt")
        return
    if arguments.weights is not None and arguments.weights.exists():
        weights = torch.load(arguments.weights, weights_only=True)
    else:
        weights = train(arguments.data, arguments.epochs)
    if arguments.weights is not None:
        torch.save(weights, arguments.weights)
    y = images(arguments.data, "test").tensors[1]
    model = network()
    model.load_state_dict(weights)
    print("| | δ | accuracy | NLL | ECE |\n| --- | --- | --- | --- | --- |")
    print(row("MAP", "", predictions(model.eval(), arguments.data).softmax(-1), y))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder) / "weights.pt")
        sides = {"this library": (sys.executable, {**os.environ, "PYTHONPATH": str(_ROOT)})}
        if arguments.peer_python:
            clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            sides["laplace-torch 0.3"] = (arguments.peer_python, clean)
        for name, (python, environment) in sides.items():
            command = [python, "-W", "ignore", __file__, "--side", folder, "--data", arguments.data]
            command += ["--grid-size", str(arguments.grid_size)]
            subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
            found = torch.load(Path(folder) / "found.pt", weights_only=True)
            label = f"{name}, search {found['seconds']:.1f} s"
            print(row(label, f"{found['chosen']:.4g}", found["probs"], y))
    chosen, probs = never_reset(arguments.data, weights, arguments.grid_size)
    print(row("this library, averaging over all values so far", f"{chosen:.4g}", probs, y))


if __name__ == "__main__":
    main()
