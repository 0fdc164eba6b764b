"""The bundled demo: scikit-learn's 8 x 8 digits under noise, and a small convolutional network trained on the spot.

The noise, drawn once with a fixed seed, makes the digits hard enough for the network to fit the training images and
still err on new ones with too much confidence. The out-of-distribution splits are made from the same test images:
`inverted` swaps ink and paper, `shuffled` puts the pixels of each image in another order.
"""

from __future__ import annotations

import gzip
import math
import os
import tempfile
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SEED = 0
SIZES = {"train": 1197, "val": 250, "test": 350}
NOISE = 0.4  # standard deviation, where ink is 1 and paper 0
EPOCHS, BATCH, RATE, DECAY = 80, 64, 5e-3, 1e-4
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


def settings() -> dict[str, Any]:
    """Return the settings of a job on the demo, by field name; without weights, which `train` makes."""
    return {
        "model": "laplace_dist.demo:network",
        "data": "laplace_dist.demo:digits",
        "ood": ["inverted", "shuffled"],
        "likelihood": "classification",
        "batch_size": 32,
    }


def digits(split: str, week: int | None = None) -> TensorDataset:
    """Return a split of the digits, the same on every call.

    Args:
        split: `train`, `val`, `test`; or `inverted`, `shuffled`, which are made from the test images.
        week: 1 to 4: of the training split a quarter, as if its data had come week by week.

    Returns:
        Images `(1, 8, 8)`, ink 1 and paper 0 plus noise, and labels from 0 to 9.

    Raises:
        ValueError: For another name or week.
    """
    if split not in (*SIZES, "inverted", "shuffled"):
        raise ValueError(f"split={split!r} is unknown; valid are {', '.join(SIZES)}, inverted and shuffled")
    if week not in (None, 1, 2, 3, 4):
        raise ValueError(f"week={week!r} is unknown; valid are 1 to 4")
    table = _table()
    images = torch.tensor(table[:, :-1], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(table[:, -1], dtype=torch.int64)
    generator = torch.Generator().manual_seed(SEED)
    images += NOISE * torch.randn(images.shape, generator=generator)
    order = torch.randperm(len(images), generator=generator).split(list(SIZES.values()))
    chosen = dict(zip(SIZES, order, strict=True)).get(split, order[2])
    x, y = images[chosen], labels[chosen]
    if split == "inverted":
        x = 1 - x
    if split == "shuffled":
        places = torch.stack([torch.randperm(64, generator=generator) for _ in range(len(x))])
        x = x.flatten(1).gather(1, places).reshape(x.shape)
    if split == "train" and week is not None:
        x, y = x.tensor_split(4)[week - 1], y.tensor_split(4)[week - 1]
    return TensorDataset(x, y)


def _table() -> np.ndarray:
    """Return scikit-learn's table of pixels and labels from the file in its package, whose import takes a second."""
    package = find_spec("sklearn")
    if package is None:
        raise ModuleNotFoundError("the digits of the demo come with scikit-learn: pip install scikit-learn")
    place = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(place, "rt") as lines:
        return np.loadtxt(lines, delimiter=",", dtype=np.int64)


def network() -> nn.Module:
    """Return the untrained network: two convolutions and a linear layer, 1,898 parameters."""
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 8, 3, padding=1),
        tanh1=nn.Tanh(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(8, 16, 3, padding=1),
        tanh2=nn.Tanh(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear=nn.Linear(64, 10),
    )
    return nn.Sequential(layers)


def trained_network() -> nn.Module:
    """Return the network after training with a fixed seed on one thread, bit for bit the same on every call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = network()
            _fit(model, *digits("train").tensors)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _fit(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Train by Adam on the cross-entropy and a penalty; `torch.optim`'s, with the same bits, takes a second to import."""
    weights = list(model.parameters())
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    step = 0
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            step += 1
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            with torch.no_grad():
                for w, mean, square in zip(weights, means, squares, strict=True):
                    g, w.grad = w.grad + DECAY * w, None
                    mean.lerp_(g, 1 - BETAS[0])
                    square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                    scale = (square.sqrt() / math.sqrt(1 - BETAS[1] ** step)).add_(EPSILON)
                    w.addcdiv_(mean, scale, value=-RATE / (1 - BETAS[0] ** step))


def train() -> str:
    """Train the network and return the path of its weights in a new temporary directory."""
    path = os.path.join(tempfile.mkdtemp(prefix="laplace-demo-"), "weights.safetensors")
    save_file(trained_network().state_dict(), path)
    return path
