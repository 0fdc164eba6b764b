"""Variances of many prior precisions from those of a few."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import KronLaplace, Laplace
from laplace.interpolation import ERROR, interpolation_for, interpolations
from laplace.tuning import prior_precision_grid, score_grid


def variance(h, weights, at):
    """Of directions with these curvatures, under these prior precisions."""
    return torch.from_numpy((weights / (h + np.asarray(at)[:, None])).sum(1))


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3, math.inf])
@pytest.mark.parametrize("decades", [0.5, 2, 8, 16])
def test_sums_of_shifted_reciprocals_within_the_stated_error(decades, largest):
    values = np.logspace(-decades / 2, decades / 2, 300)
    between, draw = interpolation_for(values, largest), np.random.default_rng(0)
    top = min(largest, 10 ** (decades / 2 + 2))
    for terms in (1, 2, 5):
        for _ in range(50):
            h = top * 10 ** draw.uniform(-decades - 4, 0, terms) * (draw.random(terms) > 0.2)
            weights = 10 ** draw.uniform(-3, 3, terms)
            found = between.at(variance(h, weights, between.nodes), values)
            torch.testing.assert_close(found, variance(h, weights, values), rtol=ERROR, atol=0)


def test_the_largest_curvature_itself_is_within_the_error():
    values = np.logspace(-4, 4, 200)
    between = interpolation_for(values, 10.0)
    known = variance(np.array([10.0]), 1.0, between.nodes)
    torch.testing.assert_close(between.at(known, values), variance(np.array([10.0]), 1.0, values), rtol=ERROR, atol=0)


def test_few_values_are_taken_themselves():
    assert interpolation_for(np.logspace(-4, 4, 27)) is None
    assert len(interpolation_for(np.logspace(-4, 4, 28)).nodes) == 27
    assert len(interpolation_for(np.logspace(-4, 4, 28), 1.0).nodes) == 15
    assert len(interpolation_for(np.logspace(-4, 4, 28), 0.0).nodes) == 5
    assert interpolation_for([1.0] * 50) is None
    assert interpolation_for([0.0, *np.logspace(-4, 4, 99)]) is None
    assert interpolation_for([]) is None


def test_nodes_lie_among_the_values_and_are_exact():
    between = interpolation_for(np.logspace(-2, 2, 100))
    assert between.nodes.min() > 1e-2 and between.nodes.max() < 1e2
    known = torch.rand(len(between.nodes), 3, dtype=torch.float64) + 0.1
    torch.testing.assert_close(between.at(known, between.nodes), known, rtol=1e-14, atol=0)


def test_bounds_that_ask_for_as_many_nodes_share_those_of_the_largest():
    values = np.logspace(-4, 4, 100)
    found = interpolations(values, [1.0, 1e-3, 0.9, math.inf])
    assert [len(between.nodes) for between in found] == [15, 7, 15, 27]
    assert found[0] is found[2]
    np.testing.assert_array_equal(found[2].nodes, interpolation_for(values, 1.0).nodes)
    few = interpolations(values[::5], [1e-3, math.inf])
    assert few[0] is not None and few[1] is None


def _deep(structure, subset="all"):
    """Layers whose largest curvatures are orders of magnitude apart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 3)
    ).double()
    data = TensorDataset(torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)))
    model[0].weight.data /= 100
    la = Laplace(model, "classification", subset, structure, temperature=0.5)
    la.fit(DataLoader(data, batch_size=10))
    return la, la.backend.capture(data.tensors[0])


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac"])
def test_every_layer_is_interpolated_from_the_nodes_of_its_own_curvature(structure, subset):
    la, capture = _deep(structure, subset)
    values = np.logspace(-4, 4, 60).tolist()
    counts = {between and len(between.nodes) for between in interpolations(values, la._largest_curvatures())}
    assert len(counts) > (subset == "all")
    exact = la._glm_variance(capture, [torch.tensor([value]).double() for value in values], True)
    found = la._grid_variance(capture, values)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=ERROR, atol=0)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_no_direction_has_more_than_the_largest_curvature(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = TensorDataset(torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)))
    la = Laplace(model, "classification", "all", structure, temperature=0.5)
    la.fit(DataLoader(data, batch_size=10))
    dense = torch.diag(la.posterior_precision) if structure == "diag" else la.posterior_precision.to_matrix()
    assert la._largest_curvature() == pytest.approx(float(torch.linalg.eigvalsh(dense).max()) - 1)  # less the prior's


def test_damped_factors_have_no_largest_curvature_and_score_as_their_values_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = TensorDataset(torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)))
    la = KronLaplace(model, "classification", damping=True)
    la.fit(DataLoader(data, batch_size=10))
    assert la._largest_curvature() == math.inf
    grid = torch.logspace(-4, 4, 60)
    found, _ = score_grid(la, DataLoader(data, batch_size=15), grid)
    alone = torch.cat([score_grid(la, DataLoader(data, batch_size=15), grid[i : i + 1])[0] for i in range(0, 60, 5)])
    torch.testing.assert_close(found[::5], alone, rtol=ERROR, atol=0)


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
