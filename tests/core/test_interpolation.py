"""Variances of many prior precisions from those of a few."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace
from laplace.interpolation import interpolated, nodes_for
from laplace.tuning import prior_precision_grid, score_grid


@pytest.mark.parametrize("decades", [0.5, 2, 8, 16])
def test_sums_of_shifted_reciprocals_to_a_part_in_ten_thousand(decades):
    values = np.logspace(-decades / 2, decades / 2, 300)
    nodes, draw = nodes_for(values), np.random.default_rng(0)
    for terms in (1, 2, 5):
        for _ in range(50):
            h = 10 ** draw.uniform(-decades / 2 - 2, decades / 2 + 2, terms) * (draw.random(terms) > 0.2)
            weights = 10 ** draw.uniform(-3, 3, terms)

            def variance(at, h=h, weights=weights):
                return torch.from_numpy((weights / (h + np.asarray(at)[:, None])).sum(1))

            found = interpolated(variance(nodes), values, nodes)
            torch.testing.assert_close(found, variance(values), rtol=1e-4, atol=0)


def test_few_values_are_taken_themselves():
    assert nodes_for(np.logspace(-4, 4, 32)) is None
    assert len(nodes_for(np.logspace(-4, 4, 33))) == 32
    assert nodes_for([1.0] * 50) is None
    assert nodes_for([0.0, *np.logspace(-4, 4, 99)]) is None
    assert nodes_for([]) is None


def test_values_that_are_nodes_are_exact():
    nodes = nodes_for(np.logspace(-2, 2, 100))
    known = torch.rand(len(nodes), 3, dtype=torch.float64) + 0.1
    torch.testing.assert_close(interpolated(known, nodes, nodes), known, rtol=1e-14, atol=0)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_long_grid_scores_as_its_values_do(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = TensorDataset(torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)))
    la = Laplace(model, "classification", "all", structure)
    la.fit(DataLoader(data, batch_size=10))
    grid, validation = prior_precision_grid(size=100), DataLoader(data, batch_size=15)
    found, n = score_grid(la, validation, grid)
    alone = torch.cat([score_grid(la, validation, grid[i : i + 1])[0] for i in range(0, 100, 3)])
    torch.testing.assert_close(found[::3] / n, alone / n, rtol=0, atol=1e-4)
    assert not torch.equal(found[::3], alone)  # it was interpolated


def test_an_output_without_variance_is_scored_value_by_value():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    data = TensorDataset(torch.zeros(8, 3), torch.randint(2, (8,)))
    la = Laplace(model, "classification", "all", "diag")
    la.fit(DataLoader(TensorDataset(torch.randn(8, 3), torch.randint(2, (8,))), batch_size=8))
    grid = prior_precision_grid(size=60)
    found, _ = score_grid(la, DataLoader(data, batch_size=8), grid)
    assert torch.equal(found, found[:1].expand_as(found)) and bool(found.isfinite().all())
