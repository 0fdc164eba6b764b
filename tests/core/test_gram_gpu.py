"""Sums of products as GPUs make them, on the CPU: both ways to multiply, any shape, parts of a sum, and rows that are small."""

from __future__ import annotations

import itertools

import pytest
import torch

from laplace.linalg import gram_gpu
from laplace.linalg.gram import mirror_

from .naive import relative_error

CUTS = (0, 192, 384, 576, 700)


@pytest.fixture(params=[True, False], ids=["float64", "runs"])
def fast(request, monkeypatch):
    monkeypatch.setattr(gram_gpu, "_is_fast", lambda device: request.param)
    return request.param


def rows(n, width, dtype=torch.float32):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n + width)).to(dtype)


def completed(total):
    mirror_(total)
    return total


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1500])
@pytest.mark.parametrize("width", [1, 5, 128, 129, 385, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_symmetric_sum(fast, n, width, dtype, monkeypatch):
    monkeypatch.setattr(gram_gpu, "_ELEMENTS", 40_000)  # several parts, and several products side by side
    values = rows(n, width, dtype)
    total = torch.eye(width, dtype=torch.float64)
    gram_gpu.add_gram_(total, [values, 2 * values], 0.5, exact=False)
    expected = torch.eye(width, dtype=torch.float64) + 2.5 * values.double().T @ values.double()
    assert relative_error(completed(total), expected) < (1e-6 if dtype is torch.float32 else 1e-14)


@pytest.mark.parametrize(("start", "stop"), itertools.combinations(CUTS, 2))
def test_rows_of_a_sum_have_the_bits_of_the_whole(fast, start, stop):
    values = rows(900, CUTS[-1])
    whole, part = (torch.zeros(b - a, b, dtype=torch.float64) for a, b in ((0, CUTS[-1]), (start, stop)))
    for total in (whole, part):
        gram_gpu.add_gram_(total, [values], 1.0, exact=False)
        mirror_(total)
    assert torch.equal(part, whole[start:stop, :stop])


def test_exact_products_are_of_float64_whatever_the_device(fast):
    values = rows(300, 40)
    total = torch.zeros(40, 40, dtype=torch.float64)
    gram_gpu.add_gram_(total, [values], 1.0, exact=True)
    assert relative_error(total, values.double().T @ values.double()) < 1e-14


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (700, 3), (200, 300)])
def test_a_product_of_two(fast, shape):
    left, right = rows(2000, shape[0]), rows(2000, shape[1] + 1)[:, 1:]
    total = torch.zeros(shape, dtype=torch.float64)
    gram_gpu.add_product_(total, left, right)
    assert relative_error(total, left.double().T @ right.double()) < 1e-6


def test_small_rows_count_beside_a_large_one(fast):
    """A hundred thousand rows that add up to a thousandth of one other."""
    values = torch.full((100_000, 4), 1e-4)
    values[0] = 1.0
    total = torch.zeros(4, 4, dtype=torch.float64)
    gram_gpu.add_gram_(total, [values], 1.0, exact=False)
    expected = values.double().T @ values.double()
    assert relative_error(total - 1, expected - 1) < 2e-3 and relative_error(total, expected) < 2e-6
