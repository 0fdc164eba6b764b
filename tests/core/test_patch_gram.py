"""Sums over a convolution's patches by lagged products, against the patches themselves in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.capture import patch_gram
from laplace.capture.geometry import Geometry
from laplace.linalg import gram
from laplace.linalg.lags import lagged_products, products
from laplace.structures import kron

from . import naive
from .test_geometry import CASES
from .test_small_rows import BOUND

FURTHER = {
    "1d-even": (nn.Conv1d(2, 3, 4, padding=2), (11,)),
    "1d-far-outside": (nn.Conv1d(2, 3, 3, padding=5), (4,)),
    "1d-steps-over": (nn.Conv1d(2, 3, 3, dilation=4, padding=4), (3,)),
    "2d-valid": (nn.Conv2d(2, 3, 3), (6, 7)),
    "2d-larger-than-the-image": (nn.Conv2d(2, 3, 5, padding=2), (4, 3)),
    "2d-one-axis": (nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), (4, 4)),
    "2d-dilated": (nn.Conv2d(2, 3, 3, padding=(0, 2), dilation=(2, 1)), (9, 4)),
    "2d-several-blocks": (nn.Conv2d(25, 3, 3, padding=1), (6, 7)),
    "3d-same": (nn.Conv3d(2, 3, (2, 3, 3), padding="same"), (3, 4, 5)),
}
STRIDE_ONE = {
    name: case
    for name, case in {**CASES, **FURTHER}.items()
    if set(case[0].stride) == {1} and case[0].padding_mode == "zeros"
}


def inputs(module, size, dtype=torch.float32):
    return torch.randn(4, module.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(dtype)


def from_patches(geometry, x, scale=1.0):
    rows = geometry.patches(x.double()).flatten(0, 1)
    return scale * rows.T @ rows


def summed(geometry, x, scale=1.0, start=0, stop=None):
    width = x.shape[1] * torch.Size(geometry.kernel).numel()
    stop = stop or width
    total = torch.zeros(stop - start, stop, dtype=torch.float64)
    patch_gram.add_gram_of_patches_(total, x, geometry, scale)
    gram.mirror_(total)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", STRIDE_ONE)
def test_any_kernel_and_padding(case, dtype):
    module, size = STRIDE_ONE[case]
    geometry, x = Geometry.of_module(module), inputs(module, size, dtype)
    assert geometry.positions(size) == geometry.patches(x).shape[1]
    bound = BOUND if dtype is torch.float32 else 1e-14
    assert naive.relative_error(summed(geometry, x, 0.25), from_patches(geometry, x, 0.25)) < bound


def test_chunks_change_nothing(monkeypatch):
    module, size = STRIDE_ONE["2d-several-blocks"]
    geometry, x = Geometry.of_module(module), inputs(module, size, torch.float64)
    monkeypatch.setattr(patch_gram, "_CHUNK", 3000)
    assert naive.relative_error(summed(geometry, x), from_patches(geometry, x)) < 1e-14


@pytest.mark.parametrize(("start", "stop"), [(0, 192), (192, 225), (0, 225)])
def test_rows_of_a_sum_have_the_bits_of_the_whole(start, stop):
    module, size = STRIDE_ONE["2d-several-blocks"]
    geometry, x = Geometry.of_module(module), inputs(module, size)
    assert torch.equal(summed(geometry, x, 1.0, start, stop), summed(geometry, x)[start:stop, :stop])


@pytest.mark.parametrize("reach", [(2,), (1, 2), (0, 1), (1, 1, 1)])
def test_lagged_products(reach):
    step = (2,) * len(reach)
    x = torch.randn(3, 2, *range(4, 4 + len(reach)), dtype=torch.float64)
    found = lagged_products(x, reach, step)
    assert products(reach) == (found[..., 0, 0].numel() + 1) // 2
    around = nn.functional.pad(x, [side for r in reversed(reach) for side in (2 * r, 2 * r)])
    for place in torch.cartesian_prod(*(torch.arange(2 * r + 1) for r in reach)).view(-1, len(reach)).tolist():
        moved = around[(..., *(slice(2 * p, 2 * p + size) for p, size in zip(place, x.shape[2:], strict=True)))]
        truth = torch.einsum("nc...,nd...->cd", x, moved)
        assert naive.relative_error(found[tuple(place)], truth) < 1e-14


@pytest.mark.parametrize("small", [5.9e-8, 1e-6, 1e-4])
def test_small_pixels_count_beside_a_large_one(small):
    geometry = Geometry.of_module(nn.Conv2d(8, 1, 3, padding=1))
    for place in ((5, 5), (0, 0), (11, 3), slice(None)):
        x = torch.full((3, 8, 12, 12), small**0.5)
        x[0][(slice(None), *(place if isinstance(place, tuple) else (place,)))] = 1.04
        assert naive.relative_error(summed(geometry, x), from_patches(geometry, x)) < BOUND, place


def test_where_it_pays():
    """Many channels, a kernel of several entries, a stride of one, and images that are not all edge."""

    def pays(x, *args, **kwargs):
        return patch_gram.pays(Geometry.of_module(nn.Conv2d(x.shape[1], 1, *args, **kwargs)), x)

    images = torch.empty(64, 64, 32, 32)
    assert pays(images, 3, padding=1) and pays(images, 5, padding="same") and pays(images, 3, padding=2, dilation=2)
    assert not pays(images, 3) and not pays(images, 3, padding=(1, 0))
    assert not pays(images, 3, padding=1, padding_mode="circular")
    assert not pays(images, 1) and not pays(images, 3, stride=2) and not pays(images[:, :3], 3, padding=1)
    assert not pays(images[..., :4, :4], 3, padding=1) and not pays(images[:1, :, :8, :8], 3, padding=1)
    assert not pays(images.to("meta"), 3, padding=1)


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.Flatten(), nn.Linear(400, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_of_a_fit(network, weighted, monkeypatch):
    x, y = torch.randn(6, 3, 10, 10, dtype=torch.float64), torch.arange(6) % 3
    la = Laplace(network, "classification", "all", "kron")
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64) if weighted else None

    def factors():
        la.initialize(x)
        sums = la.zero_sums()
        la.backend.accumulate(sums, x, y, example_weights=weights)
        return sums.tensors

    plain = factors()
    used = []
    add = patch_gram.add_gram_of_patches_
    monkeypatch.setattr(kron, "pays", lambda geometry, x: True)
    monkeypatch.setattr(kron, "add_gram_of_patches_", lambda *args: used.append(args[1].shape[1]) or add(*args))
    lagged = factors()
    assert used == [16]  # the first convolution's sum is small
    assert all(naive.relative_error(lagged[name], plain[name]) < 1e-13 for name in plain)


def test_a_convolution_that_runs_twice_keeps_its_patches(monkeypatch):
    """Its patches of both runs are one sum, divided by the positions of both."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16 * 16, 3)

        def forward(self, x):
            return self.head(self.conv(self.conv(x).tanh()).flatten(1))

    torch.manual_seed(0)
    model, x, y = Twice().double(), torch.randn(4, 16, 4, 4, dtype=torch.float64), torch.arange(4) % 3
    plain = Laplace(model, "classification", "all", "kron")
    plain.fit([(x, y)])
    monkeypatch.setattr(kron, "pays", lambda geometry, x: True)
    again = Laplace(model, "classification", "all", "kron")
    again.fit([(x, y)])
    assert torch.equal(plain.log_marginal_likelihood(), again.log_marginal_likelihood())
