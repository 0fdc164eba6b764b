"""Patches of convolutions, against slices of the padded input, whatever their kernel, and their sums of outer products."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from laplace.capture.geometry import Geometry
from laplace.linalg import gram

CASES = {
    "1d": (nn.Conv1d(2, 3, 3, padding=1), (11,)),
    "1d-reflect-dilated": (nn.Conv1d(2, 3, 3, padding=2, dilation=2, padding_mode="reflect"), (9,)),
    "2d-wide": (nn.Conv2d(2, 3, 3, padding=1), (4, 12)),
    "2d-wide-stride": (nn.Conv2d(2, 3, (3, 2), stride=2, padding=1), (7, 20)),
    "2d-narrow": (nn.Conv2d(2, 3, 3, padding=1), (12, 4)),
    "2d-narrow-stride": (nn.Conv2d(2, 3, 3, stride=(1, 2), padding=1, dilation=(2, 1)), (9, 9)),
    "2d-uneven": (nn.Conv2d(2, 3, (2, 4), padding="same"), (5, 9)),
    "2d-circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 4)),
    "2d-point": (nn.Conv2d(2, 3, 1, stride=2), (5, 9)),
    "2d-whole": (nn.Conv2d(2, 3, (4, 9)), (4, 9)),
    "3d": (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (3, 4, 9)),
}


def padded(geometry: Geometry, x):
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    return nn.functional.pad(x, sides, mode="constant" if geometry.mode == "zeros" else geometry.mode)


def expected(geometry: Geometry, x):
    """Patch by patch."""
    x = padded(geometry, x)
    reach = [d * (k - 1) + 1 for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    starts = [range(0, size - r + 1, s) for size, r, s in zip(x.shape[2:], reach, geometry.stride, strict=True)]
    found = []
    for corner in itertools.product(*starts):
        inside = [slice(c, c + r, d) for c, r, d in zip(corner, reach, geometry.dilation, strict=True)]
        found.append(x[(..., *inside)].flatten(1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("case", CASES)
def test_patches(case):
    module, size = CASES[case]
    x = torch.rand(3, 2, *size)
    geometry = Geometry.of_module(module)
    found = geometry.patches(x)
    assert torch.equal(found, expected(geometry, x))
    weight = module.weight.flatten(1).detach()
    outputs = (found @ weight.T + module.bias.detach()).transpose(1, 2)
    torch.testing.assert_close(outputs, module(x).detach().flatten(2))


@pytest.mark.parametrize(
    ("n", "positions", "width"),
    [
        (3, 256, 200),
        (4, 64, 200),
        (5, 64, 200),
        (3, 100, 200),
        (70, 1, 200),
        (1, 5000, 300),
        (2, 256, 100),
        (2, 200, 30),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gram_matrices_of_patches_in_memory_of_either_order(n, positions, width, scale):
    values = torch.randn(n, width, positions)
    rows = values.mT.double().flatten(0, 1)
    truth = torch.ones(width, width, dtype=torch.float64) + scale * rows.T @ rows
    for value in (values.mT, values.mT.contiguous()):
        total = torch.ones(width, width, dtype=torch.float64)
        gram.add_gram_of_positions_(total, [value, value[:0]], scale)
        gram.mirror_(total)
        assert (total - truth).abs().max() < 2e-6 * truth.diagonal().max()
