"""The bundled demo: scikit-learn's 8 x 8 digits under noise, and a small convolutional network trained on the spot.

The noise, drawn once with a fixed seed, makes the digits hard enough for the network to fit the training images and
still err on new ones with too much confidence. The out-of-distribution splits are made from the same test images:
`inverted` swaps ink and paper, `shuffled` puts the pixels of each image in another order.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SEED = 0
SIZES = {"train": 1197, "val": 250, "test": 350}
NOISE = 0.4  # standard deviation, where ink is 1 and paper 0
EPOCHS, BATCH, RATE, DECAY = 80, 64, 5e-3, 1e-4


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
    from sklearn.datasets import load_digits

    if split not in (*SIZES, "inverted", "shuffled"):
        raise ValueError(f"split={split!r} is unknown; valid are {', '.join(SIZES)}, inverted and shuffled")
    if week not in (None, 1, 2, 3, 4):
        raise ValueError(f"week={week!r} is unknown; valid are 1 to 4")
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
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
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters())
            (nn.functional.cross_entropy(model(x[index]), y[index]) + DECAY / 2 * penalty).backward()
            optimizer.step()


def train() -> str:
    """Train the network and return the path of its weights in a new temporary directory."""
    path = os.path.join(tempfile.mkdtemp(prefix="laplace-demo-"), "weights.safetensors")
    save_file(trained_network().state_dict(), path)
    return path
