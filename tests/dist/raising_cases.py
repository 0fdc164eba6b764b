"""A model that raises, in workers only, an error that no other process can unpickle."""

from __future__ import annotations

import os
from pathlib import Path

import dist_cases
from torch import nn


class StubbornError(Exception):
    """Its constructor takes more than its message, so that unpickling it fails."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Raising(nn.Sequential):
    """Raises whenever a worker uses it, and leaves a note."""

    def forward(self, x):
        if dist_cases.in_worker():
            with open(self.folder / f"raised-{os.getpid()}", "a") as file:
                file.write("again\n")
            raise StubbornError(7, f"a batch of {len(x)} does not please this model")
        return super().forward(x)


def model(folder: str) -> nn.Module:
    network = Raising(*dist_cases.convnet()).eval()
    network.folder = Path(folder)
    return network
