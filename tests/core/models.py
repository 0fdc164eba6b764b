"""Small networks that cover every way in which a parameter can reach the output, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Pool(nn.Module):
    """Mean over positions of a sequence ``(batch, positions, width)``."""

    def forward(self, x):
        return x.mean(1)


class Twice(nn.Module):
    """The same layer called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.shared(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.shared(h)))


class Tied(nn.Module):
    """Two modules that own one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))))


class UsedOutside(nn.Module):
    """A weight that is used by its module and, transposed, outside of it."""

    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Linear(3, 4), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.tanh(self.one(x))
        return self.last(F.linear(h, self.one.weight.T))


class Normed(nn.Module):
    """Layer norm, and batch norm with running statistics that are not trivial."""

    def __init__(self):
        super().__init__()
        self.first, self.ln, self.bn, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.bn.running_mean += torch.tensor([0.1, -0.2, 0.3, 0.0])
        self.bn.running_var *= torch.tensor([0.5, 1.5, 2.0, 1.0])
        with torch.no_grad():
            self.ln.weight += torch.tensor([0.1, 0.2, -0.3, 0.4])

    def forward(self, x):
        return self.last(torch.tanh(self.bn(self.ln(self.first(x)))))


class Residual(nn.Module):
    """Adds its input to a branch in place."""

    def __init__(self, norm=False):
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, x):
        h = torch.tanh(self.first(x))
        out = self.branch(h)
        out += h
        return self.last(torch.tanh(self.norm(out)))


class Gated(nn.Module):
    """A learned scale without dimensions, as of a residual gate."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(3, 4), nn.Parameter(torch.tensor(0.7)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.gate * self.first(x)))


class Words(nn.Module):
    """Embedding, per-token layer, pooling."""

    def __init__(self):
        super().__init__()
        self.table, self.token, self.last = nn.Embedding(6, 3), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.token(self.table(x))).mean(1))


def mlp(inputs=3, outputs=3, bias=True, hidden=4):
    return nn.Sequential(nn.Linear(inputs, hidden, bias), nn.Tanh(), nn.Linear(hidden, outputs, bias))


def frozen():
    """First weight, and last bias, without gradient."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def conv(conv_layer, width):
    return nn.Sequential(conv_layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))


@dataclass
class Case:
    """A model, its inputs and targets, and which parameters are expected to need their own Jacobians."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3,)
    outputs: tuple[int, ...] = (3,)
    likelihood: str = "classification"
    fallback: tuple[str, ...] = ()
    vocabulary: int = 0
    curvlinops: tuple[str, ...] = ("full", "kron", "diag")

    def make(self, n=5, dtype=torch.float64, seed=0):
        """Model in evaluation mode, inputs, targets."""
        torch.manual_seed(seed)
        model = self.build().to(dtype).eval()
        x = torch.randn(n, *self.shape, dtype=torch.float64).to(dtype)
        if self.vocabulary:
            x = torch.randint(self.vocabulary, (n, *self.shape))
        if self.likelihood == "regression":
            return model, x, torch.randn(n, *self.outputs, dtype=torch.float64).to(dtype)
        return model, x, torch.randint(self.outputs[-1], (n, *self.outputs[:-1]))


DENSE = ("full", "diag")
CASES = {
    "mlp": Case(mlp),
    "two-classes": Case(lambda: mlp(outputs=2), outputs=(2,)),
    "ten-classes": Case(lambda: mlp(outputs=10), outputs=(10,)),
    "regression": Case(lambda: mlp(outputs=2), outputs=(2,), likelihood="regression"),
    "no-bias": Case(lambda: mlp(bias=False)),
    "frozen": Case(frozen),
    "stride-padding": Case(lambda: conv(nn.Conv2d(2, 2, (3, 2), stride=(2, 1), padding=(1, 0)), 12), (2, 4, 4)),
    "same-dilation": Case(lambda: conv(nn.Conv2d(1, 2, (2, 3), padding="same", dilation=2), 32), (1, 4, 4)),
    "valid-no-bias": Case(lambda: conv(nn.Conv2d(1, 2, 2, padding="valid", bias=False), 18), (1, 4, 4)),
    "reflect": Case(
        lambda: conv(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), 18), (1, 3, 3), curvlinops=DENSE
    ),
    "circular-same": Case(
        lambda: conv(nn.Conv2d(1, 2, 2, padding="same", padding_mode="circular"), 18), (1, 3, 3), curvlinops=DENSE
    ),
    "two-convolutions": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)
        ),
        (1, 4, 4),
    ),
    "grouped": Case(
        lambda: conv(nn.Conv2d(2, 2, 2, groups=2), 18),
        (2, 4, 4),
        fallback=("0.weight",),
        curvlinops=DENSE,
    ),
    "sequence": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Pool(), nn.Linear(4, 3)), (2, 3)),
    "sequence-output": Case(mlp, (2, 3), (2, 3), curvlinops=("diag",)),
    "sequence-regression": Case(mlp, (2, 3), (2, 3), "regression", curvlinops=("diag",)),
    "twice": Case(Twice, curvlinops=DENSE),
    "tied": Case(Tied, curvlinops=DENSE),
    "used-outside": Case(UsedOutside, fallback=("one.weight",), curvlinops=DENSE),
    "normed": Case(Normed, fallback=("ln.weight", "ln.bias", "bn.weight", "bn.bias"), curvlinops=DENSE),
    "scalar": Case(Gated, fallback=("gate",), curvlinops=DENSE),
    "embedding": Case(Words, (3,), fallback=("table.weight",), vocabulary=6, curvlinops=DENSE),
    "inplace-relu": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))),
    "inplace-residual": Case(Residual),
    "inplace-residual-fallback": Case(
        lambda: Residual(norm=True), fallback=("norm.weight", "norm.bias"), curvlinops=DENSE
    ),
}


def loader(x, y, batch_size=2):
    """Batches in order."""
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)
