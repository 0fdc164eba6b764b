"""A batch looks at the values of its tensors once: on a GPU every look waits for all that was asked of the device before."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace import Laplace
from laplace.curvature import backend_class
from laplace.likelihoods import WeightedCategorical

LOOKS = ("_local_scalar_dense", "nonzero", "unique", "equal", "masked_select", "repeat_interleave")


def networks():
    return {
        "mlp": (nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), (64,)),
        "cnn": (
            nn.Sequential(
                nn.Conv2d(3, 32, 3),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, stride=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * 36, 10),
            ),
            (3, 16, 16),
        ),
        "norm": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, 10),
            ),
            (3, 16, 16),
        ),
        "transformer": (
            nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Flatten(), nn.Linear(320, 10)),
            (10, 32),
        ),
    }


class Looks(TorchDispatchMode):
    """Notes where the library makes a value of a tensor, or a shape of its values."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in LOOKS):
            frame = [f for f in traceback.extract_stack() if "laplace" in f.filename][-1]
            if not frame.filename.endswith("noise.py"):  # whose values are on the host always
                self.places.append(f"{frame.filename}:{frame.lineno}: {func.name()}")
        return func(*args, **(kwargs or {}))


def batches(shape, classes=10):
    torch.manual_seed(0)
    return torch.randn(32, *shape), torch.randint(classes, (32,))


@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("name", networks())
def test_a_batch_looks_once(name, structure, estimator):
    model, shape = networks()[name]
    x, y = batches(shape)
    assert len(looks(model, "classification", structure, estimator, x, y)) == 1


@pytest.mark.parametrize("likelihood", ["regression", WeightedCategorical(ignore_index=-100)])
def test_other_likelihoods(likelihood):
    model, shape = networks()["mlp"]
    x, y = batches(shape)
    y = y if isinstance(likelihood, WeightedCategorical) else torch.randn(32, 10)
    assert len(looks(model, likelihood, "kron", "ggn", x, y)) == 1


def looks(model, likelihood, structure, estimator, x, y):
    cls, kwargs = backend_class("native", estimator)
    la = Laplace(model.eval(), likelihood, "all", structure, backend=cls, backend_kwargs=kwargs)
    la.initialize(x)
    sums = la.zero_sums()
    la.accumulate(sums, x, y)
    with Looks() as mode:
        la.accumulate(sums, x, y, 32)
    return mode.places
