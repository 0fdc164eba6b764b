"""Networks that run out of memory: by batches that are too large, at some examples, or now and then."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import dist_cases
import torch
from torch import nn

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has 1.00 GiB free"),
    "cpu": lambda: torch.empty(1 << 55),  # which torch's own allocator refuses
    "python": lambda: MemoryError(),
    "kernel": lambda: _killed(),  # as by a kernel that has no memory left
}


def _killed() -> None:
    if dist_cases.in_worker():
        os.kill(os.getpid(), signal.SIGKILL)


class Hungry(nn.Module):
    """Asks for more than there is where a batch is larger than `most`, or an input larger than `marker`."""

    def __init__(self, most: int, error: str, marker: float, once: str) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))
        self.most, self.error, self.marker, self.once = most, error, marker, once

    def forward(self, x):
        if len(x) > self.most or (len(x) > 4 and float(x.max()) > self.marker):
            self.starve()
        return self.net(x)

    def starve(self) -> None:
        if self.once:
            if Path(self.once).exists():
                return
            Path(self.once).touch()
        found = ERRORS[self.error]()
        if isinstance(found, BaseException):
            raise found


def hungry(most: int = 8, error: str = "cuda", marker: float = float("inf"), once: str = "") -> nn.Module:
    return Hungry(most, error, marker, once).eval()
