"""A network whose factors are wide enough to be cut within, for the tests of module groups."""

from __future__ import annotations

import torch
from torch import nn


def wide(hidden: int = 12, inputs: int = 36) -> nn.Module:
    """Return a network of 483 weights: dense curvature in three blocks of rows; `hidden=200` cuts a Kronecker factor too."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3)).eval()
