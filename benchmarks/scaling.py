"""CPU seconds and peak memory of fits and predictions where outputs, positions or uncovered parameters are many.

    python benchmarks/scaling.py                      # every row, each in a process of its own
    python benchmarks/scaling.py --row attention kron

A row is one batch of 32 examples, fitted and predicted twice; the second time counts. Peak memory is that of the process above
what it had before the first of them. Run it beside an older checkout (PYTHONPATH) for the difference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from laplace import Laplace


class Functional(nn.Module):
    """A weight that no module calls, and a head of many outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.weight, self.gate, self.head = (
            nn.Parameter(torch.randn(64, 64) / 8),
            nn.Parameter(torch.ones(64)),
            nn.Linear(64, outputs),
        )

    def forward(self, x):
        """Outputs."""
        return self.head(torch.tanh(self.gate * torch.einsum("ni,oi->no", x, self.weight)))


class Cell(nn.Module):
    """A recurrent cell over a sequence."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        """Outputs."""
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Encoder(nn.Module):
    """One layer of a transformer."""

    def __init__(self, width=64):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        """Outputs."""
        return self.head(self.encoder(x).mean(1))


class Words(nn.Module):
    """A table of words."""

    def __init__(self, sparse):
        super().__init__()
        self.table, self.head = nn.Embedding(5000, 32, sparse=sparse), nn.Linear(32, 4)

    def forward(self, x):
        """Outputs."""
        return self.head(torch.tanh(self.table(x)).mean(1))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(64, 64)

    def forward(self, x):
        """Outputs."""
        return F.linear(torch.tanh(self.one(x)), self.one.weight.T)[:, :10]


class Recurrent(nn.Module):
    """A recurrent layer over a sequence."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(32, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        """Outputs."""
        return self.head(self.layer(x)[0][:, -1])


class Memory(nn.Module):
    """Attention whose keys and values are others than its queries."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        """Outputs."""
        return self.head(self.layer(x[:, :8], x, x, need_weights=False)[0].mean(1))


class Vision(nn.Module):
    """A vision transformer with a class token, learned positions and a layer scale."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.patch, self.head = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 10)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 64)), nn.Parameter(torch.randn(1, 65, 64))
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        """Outputs."""
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head((self.scale * self.encoder(x))[:, 0])


class Language(nn.Module):
    """A language model whose head is its table."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 64), nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)

    def forward(self, x):
        """Outputs."""
        return F.linear(self.layer(self.table(x)), self.table.weight)[:, -1]


def slopes():
    layers = [nn.Conv2d(3, 32, 3, 2, padding=1), nn.PReLU(32)]
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.InstanceNorm2d(32, affine=True), nn.PReLU(32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def decoder():
    return nn.Sequential(
        nn.Linear(16, 8 * 16), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 256, 10),
    )  # fmt: skip


def convolutions(outputs):
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(32 * 64, outputs),
    )  # fmt: skip


def images(n):
    return torch.randn(n, 3, 32, 32)


MC = {"backend_kwargs": {"stochastic": True, "seed": 0}}
# name: (model, number of examples to inputs, structures, options)
ROWS = {
    "uncovered, one draw": (lambda: Functional(100), lambda n: torch.randn(n, 64), ("diag", "kron"), MC),
    "uncovered, exact": (lambda: Functional(20), lambda n: torch.randn(n, 64), ("diag",), {}),
    "tied": (Tied, lambda n: torch.randn(n, 64), ("diag", "kron"), {}),
    "attention": (Encoder, lambda n: torch.randn(n, 16, 64), ("diag", "kron"), {}),
    "transposed convolutions": (decoder, lambda n: torch.randn(n, 16), ("diag",), {}),
    "vision transformer": (Vision, lambda n: torch.randn(n, 3, 32, 32), ("diag", "kron"), {}),
    "PReLU and instance norm": (slopes, images, ("diag",), {}),
    "LSTM": (lambda: Recurrent(nn.LSTM), lambda n: torch.randn(n, 16, 32), ("diag", "kron"), {}),
    "GRU": (lambda: Recurrent(nn.GRU), lambda n: torch.randn(n, 16, 32), ("diag", "kron"), {}),
    "attention over a memory": (Memory, lambda n: torch.randn(n, 24, 64), ("diag", "kron"), {}),
    "tied table": (Language, lambda n: torch.randint(50, (n, 16)), ("diag",), {}),
    "LSTM cell": (lambda: Cell(nn.LSTMCell), lambda n: torch.randn(n, 8, 32), ("diag", "kron"), {}),
    "dense embedding": (lambda: Words(False), lambda n: torch.randint(5000, (n, 12)), ("diag",), {}),
    "sparse embedding": (lambda: Words(True), lambda n: torch.randint(5000, (n, 12)), ("diag",), {}),
    "100 outputs": (lambda: convolutions(100), images, ("diag", "kron"), MC),
    "convolutions": (lambda: convolutions(10), images, ("diag",), {}),
}


class Peak:
    """Largest resident memory while a block runs, above that at its start, in MB."""

    def __enter__(self):
        self._stop, self.base, self.highest = threading.Event(), _resident(), 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, _resident() - self.base)

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def one(name: str, structure: str, n: int) -> None:
    torch.manual_seed(0)
    make, inputs, _, options = ROWS[name]
    model, x = make(), inputs(n)
    with torch.no_grad():
        y = torch.randint(model(x[:2]).shape[1], (n,))
    la = Laplace(model, "classification", "all", structure, **options)
    found = {}
    with Peak() as peak:
        for _ in range(2):
            for what, action in (("fit", lambda: la.fit([(x, y)])), ("predict", lambda: la(x))):
                begin = time.process_time()
                action()
                found[what] = time.process_time() - begin
    print(f"{found['fit']:8.3f} {found['predict']:8.3f} {peak.highest:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs=2, metavar=("NAME", "STRUCTURE"))
    parser.add_argument("--examples", type=int, default=32)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.row:
        one(*arguments.row, arguments.examples)
        return
    print(f"{'':36} fit (CPU s)  predict  peak (MB)")
    for name, (_, _, structures, _) in ROWS.items():
        for structure in structures:
            command = [sys.executable, "-W", "ignore", __file__, "--row", name, structure]
            command += ["--examples", str(arguments.examples)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"{name + ', ' + structure:36} {output.strip()}", flush=True)


if __name__ == "__main__":
    main()
