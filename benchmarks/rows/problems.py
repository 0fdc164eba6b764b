"""The models and data of the rows, with random weights; they import neither library, so that both environments have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()


def cnn() -> nn.Module:
    """Convolutions 32, 64 with stride 2 and 64 with stride 2 on 3 × 32 × 32, then 256 to 10."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    ).eval()


def many_classes() -> nn.Module:
    """512 features, 1,000 classes."""
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1000)).eval()


SHAPES = {mlp: (784,), cnn: (3, 32, 32), many_classes: (512,)}


def problem(make: Callable[[], nn.Module], examples: int, batch_size: int) -> tuple[nn.Module, DataLoader]:
    """Return a model and random data, the same in every process."""
    torch.manual_seed(0)
    model = make()
    classes = model[-1].out_features
    data = TensorDataset(torch.rand(examples, *SHAPES[make]), torch.randint(0, classes, (examples,)))
    return model, DataLoader(data, batch_size=batch_size)


def epoch(model: nn.Module, loader: DataLoader) -> Callable[[], None]:
    """Return what does one pass of training: forward and backward for every batch, without the optimiser."""

    def run() -> None:
        for x, y in loader:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    return run


@torch.no_grad()
def _forward(model: nn.Module, batches: list[Tensor]) -> None:
    for x in batches:
        model(x)


def forward(model: nn.Module, loader: DataLoader, passes: int = 1) -> Callable[[], None]:
    """Return what does forward passes over the data."""
    batches = [x for x, _ in loader]
    return lambda: [_forward(model, batches) for _ in range(passes)] and None
