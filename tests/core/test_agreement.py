"""Sums of terms against what was computed otherwise: rounding is allowed for, other terms are noticed however many there are."""

from __future__ import annotations

import pytest
import torch

from laplace.capture.agreement import add_up

SPACINGS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, "tf32": 2.0**-10, torch.bfloat16: 2.0**-7}


def terms(n, seed=0, size=40):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_terms_that_are_rounded_each_by_itself_add_up(n, kind):
    values = terms(n)
    assert add_up(values.to(kind).double(), values.sum(0), SPACINGS[kind])


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("kind", SPACINGS)
def test_other_terms_do_not(n, kind):
    """Of a hundred thousand terms that cancel, the sum of others is 1 % of the sum of their absolute values."""
    values = terms(n)
    assert not add_up(values * (terms(n, 1) > 0), values.sum(0), SPACINGS[kind])


def test_sums_in_single_precision_of_terms_of_one_sign_add_up():
    values = terms(100_000).abs().float()
    assert add_up(values.double(), values.cumsum(0)[-1].double(), SPACINGS[torch.float32])


def test_nothing_adds_up_to_nothing():
    assert add_up(torch.zeros(3, 2), torch.zeros(2), 1e-7) and not add_up(torch.zeros(3, 2), torch.ones(2), 1e-7)
