"""Models and data of the jobs here; workers import this module."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

N = 96


def network() -> nn.Module:
    """Convolutions, a norm, a table-free head: what cuDNN and cuBLAS are asked for."""
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 200), nn.Tanh(), nn.Linear(200, 3)).eval()


def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}.get(split, 3))
    n = N if split == "train" else 32
    x = torch.randn(n, 1, 10, 10, generator=generator)
    return x, (x.mean((1, 2, 3)) * 20 + 1.5).long().clamp(0, 2)


def images(split: str) -> Dataset:
    return TensorDataset(*tensors(split))


class Greedy(nn.Module):
    """Takes a gigabyte for every 16 examples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x):
        if len(x) > 8 and x.is_cuda:
            room = torch.zeros(len(x) << 24, device=x.device)
            x = x + room[0]
        return self.net(x)


def greedy() -> nn.Module:
    return Greedy().eval()
