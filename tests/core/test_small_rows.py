"""Sums of outer products in float32 keep their bound where small rows stand beside large ones, in any place, of any width."""

from __future__ import annotations

import pytest
import torch

from laplace.linalg import gram, gram_gpu, matmul
from laplace.linalg.small_rows import RUN, loses, small_first

from .naive import relative_error

BOUND = 2e-6  # of the README
SMALL = (5.9e-8, 1e-6, 1e-4)  # of the square of a large row; the first is lost beside it each time
WIDTHS = (3, 64, 120, 200)  # of small sums, of per-example products, and of sums by blocks
N = 640


def one_large(rows):
    rows[0] = 1


def one_in_each_run(rows):
    rows[RUN // 2 :: RUN] = 1


def half_of_its_columns(rows):
    rows[0, : rows.shape[1] // 2] = 1


def falling(rows):
    rows.copy_(torch.logspace(0, -5, len(rows))[:, None].expand_as(rows))


def equal(rows):
    rows.fill_(1.09**0.5)


ORDERS = (one_large, one_in_each_run, half_of_its_columns, falling, equal)


def of_rows(total, rows):
    gram.add_gram_(total, [rows])


def of_columns(total, rows):
    gram.add_gram_(total, [rows.T.contiguous().T])


def of_pixels(total, rows):
    images = rows.unflatten(0, (5, -1))
    gram.add_gram_of_positions_(total, [images.mT.contiguous().mT])


def of_a_product(total, rows):
    gram.add_product_(total, rows, rows)


def on_a_gpu_without_fast_float64(total, rows):
    gram_gpu.add_gram_(total, [rows], 1.0, exact=False)


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", [of_rows, of_columns, of_pixels, of_a_product, on_a_gpu_without_fast_float64])
def test_small_rows_count(way, order, small, monkeypatch):
    monkeypatch.setattr(gram_gpu, "_is_fast", lambda device: False)
    for width in WIDTHS:
        rows = torch.full((N, width), small**0.5)
        order(rows)
        total = torch.zeros(width, width, dtype=torch.float64)
        way(total, rows)
        gram.mirror_(total)
        assert relative_error(total, rows.double().T @ rows.double()) < BOUND, width


@pytest.mark.parametrize("faster", [True, False])
def test_small_squares_of_products_count(faster, monkeypatch):
    """Of 200 examples, of which the first is large."""
    monkeypatch.setattr(matmul, "is_faster", lambda: faster and matmul.is_possible())
    monkeypatch.setattr(matmul, "_fewest", lambda: 0)
    left, right = torch.ones(200, 4, 16), torch.ones(200, 4, 24)
    left[1:] *= SMALL[0] ** 0.5
    truth = torch.bmm(left.double().mT, right.double()).square().sum(0)
    assert relative_error(matmul.sum_of_squared_products(left, right), truth) < BOUND


def test_rows_are_moved_only_where_that_matters():
    rows = torch.randn(N, 8)
    assert small_first(rows)[0] is rows and not loses(torch.zeros(5))
    rows[:9] *= 1e3
    moved, others = small_first(rows, rows[:, :3].contiguous())
    assert torch.equal(moved[:, :3], others) and (moved.norm(dim=1) * others.norm(dim=1)).diff().min() >= 0
    assert torch.equal(moved.sort(0).values, rows.sort(0).values)
    for broken in (float("nan"), float("inf")):
        assert not loses(torch.tensor([1.0, broken]))
    assert small_first(rows.double())[0].dtype == torch.float64 and not small_first(rows[:, :0])[0].numel()
