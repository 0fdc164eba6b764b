"""Sums do not drift and are not rounded, whatever torch's switches say; checks know how coarse products are."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from core.naive import relative_error
from core.test_drift import BOUND, directions, head, laplace, reference, worst
from torch import nn

from laplace import Laplace
from laplace.linalg import gram_gpu
from laplace.linalg.precision import products_in

STRUCTURES = ("full", "kron", "diag")
N = 30_000


@pytest.fixture(params=["float64", "runs"])
def product(request, monkeypatch):
    """Both ways to multiply rows, of which a device has one."""
    monkeypatch.setattr(gram_gpu, "_is_fast", lambda device: request.param == "float64")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("features", [5, 300])
@pytest.mark.parametrize("data", ["falling", "rising", "one-large", "same"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sums_do_not_drift(structure, data, features, precision, product, device):
    if structure == "full" and features > 5:
        features = 40
    model, (x, y) = head(features), worst(data, N, features)
    f = model.double()(x.double()).detach()
    model = model.float().to(device)
    truth = reference(x, directions(f, y, "ggn"), structure)
    la = laplace(model, "native", "ggn", structure, "last_layer")
    with products_in(precision):
        la.initialize(x[:4].to(device))
        sums = la.zero_sums()
        for start in range(0, N, 7000):
            la.accumulate(sums, x[start : start + 7000].to(device), y[start : start + 7000].to(device), start)
    for name, value in sums.tensors.items():
        # under TF32 the outputs themselves are rounded, and with them what follows from probabilities
        bound = BOUND if precision == "ieee" or name.endswith("/A") else 0.05
        assert relative_error(value.cpu(), truth[name]) < bound, name


SETTINGS = {
    "older": "torch.set_float32_matmul_precision('high'); torch.backends.cudnn.allow_tf32 = True",
    "newer": "torch.backends.fp32_precision = 'tf32'",
    "mixed": "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.cudnn.conv.fp32_precision = 'ieee'",
}
SCRIPT = """
import torch, warnings
{settings}
from torch import nn
from laplace import Laplace
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).cuda()
x, y = torch.randn(64, 3, 8, 8).cuda(), torch.randint(4, (64,)).cuda()
warnings.filterwarnings("error", message="No Kronecker factors")
for structure in ("kron", "diag", "full"):
    la = Laplace(model, "classification", "all", structure)
    la.fit([(x[:40], y[:40]), (x[40:], y[40:])])
    exact = Laplace(model.double(), "classification", "all", structure)
    exact.fit([(x.double(), y)])
    model.float()
    for name, value in la.sums.tensors.items():
        error = float((value - exact.sums.tensors[name]).norm() / exact.sums.tensors[name].norm())
        assert error < 5e-3, (name, error)
    print(structure, la.coverage, la(x[:2]).shape)
"""


@pytest.mark.parametrize("way", SETTINGS)
def test_every_way_to_switch_tf32_on(way):
    """No layer loses its factors for it, and nothing fails; in a process of its own, since torch has two ways that exclude each other."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(settings=SETTINGS[way])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("kron") >= 4


@pytest.mark.parametrize("kind", ["conv", "grouped conv", "attention", "tied"])
def test_factors_are_kept_under_tf32(kind, device):
    """What a check finds in float32 it finds in TF32: which parameter is covered how."""
    torch.manual_seed(0)
    models = {
        "conv": lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 3)
        ),
        "grouped conv": lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3, groups=3), nn.Tanh(), nn.Flatten(), nn.Linear(12 * 36, 3)
        ),
        "attention": lambda: nn.Sequential(
            nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 32, batch_first=True), nn.Flatten(), nn.Linear(192, 3)
        ),
        "tied": lambda: _Tied(),
    }
    model, x = models[kind]().to(device).eval(), torch.randn(8, 3, 8, 8, device=device)
    y = torch.randint(3, (8,), device=device)
    found = {}
    for precision in ("ieee", "tf32"):
        with products_in(precision), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la = Laplace(model, "classification", "all", "kron")
            la.fit([(x, y)])
            found[precision] = la
    assert list(found["ieee"].coverage) == list(found["tf32"].coverage)
    for name, value in found["tf32"].sums.tensors.items():
        assert relative_error(value, found["ieee"].sums.tensors[name]) < 2e-2, name


class _Tied(nn.Module):
    """A convolution's weight that is used twice, once by a function."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3 * 64, 3)

    def forward(self, x):
        h = torch.tanh(self.conv(x))
        h = torch.tanh(nn.functional.conv2d(h, self.conv.weight, padding=1))
        return self.last(h.flatten(1))
