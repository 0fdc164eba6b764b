"""Before a fit, a posterior is its prior."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from laplace import Laplace, NotFittedError

from .models import CASES, mlp

INDICES = torch.tensor([9, 2, 30])


def made(subset, structure, **kwargs):
    kwargs |= {"subnetwork_indices": INDICES} if subset == "subnetwork" else {}
    kwargs |= {"last_layer_name": "2"} if subset == "last_layer" else {}
    return Laplace(mlp().double(), "classification", subset, structure, prior_precision=2.5, **kwargs)


WEIGHTS = [(s, h) for s in ("all", "last_layer") for h in ("full", "kron", "diag")]
WEIGHTS += [("subnetwork", "full"), ("subnetwork", "diag"), ("all", "lowrank")]


@pytest.mark.parametrize("subset, structure", WEIGHTS)
@pytest.mark.parametrize("mean", ["scalar", "vector"])
def test_mean_and_density_are_the_prior_s(subset, structure, mean):
    la = made(subset, structure)
    mu = torch.linspace(-1, 1, la.n_params, dtype=torch.float64) if mean == "vector" else torch.tensor(0.5).double()
    la.prior_mean = mu
    chosen = INDICES if subset == "subnetwork" else torch.arange(la.n_params)
    mu = mu.expand(la.n_params)
    assert torch.equal(la.mean[chosen], mu[chosen])
    if subset == "subnetwork":  # the others have no distribution and stay
        others = [i for i in range(31) if i not in INDICES]
        assert torch.equal(la.mean[others], parameters_to_vector(la.model.parameters()).detach()[others])
    value = torch.randn(4, la.n_params, dtype=torch.float64)
    normal = torch.distributions.Normal(mu[chosen], 2.5**-0.5)
    assert torch.allclose(la.log_prob(value), normal.log_prob(value[:, chosen]).sum(-1))
    constant = len(chosen) / 2 * math.log(2.5 / (2 * math.pi))
    assert torch.allclose(la.log_prob(value, normalized=False), la.log_prob(value) - constant)


@pytest.mark.parametrize("subset, structure", WEIGHTS)
def test_curvature_is_zero_and_of_its_shape(subset, structure):
    la = made(subset, structure)
    n = len(INDICES) if subset == "subnetwork" else la.n_params
    if structure == "lowrank":
        assert [tuple(part.shape) for part in la.H] == [(31, 0), (0,)]
    elif structure == "kron":
        assert torch.equal(la.H.to_matrix(), torch.zeros(n, n, dtype=torch.float64))
    else:
        assert torch.equal(la.H, torch.zeros((n, n) if structure == "full" else n, dtype=torch.float64))


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_of_a_last_layer_that_is_not_known_there_is_nothing(structure):
    la = Laplace(mlp(), "classification", "last_layer", structure)
    assert la.mean is None
    assert la.H is None
    with pytest.raises(NotFittedError, match="call fit"):
        la.log_prob(torch.zeros(15))


@pytest.mark.parametrize("subset, structure", WEIGHTS)
def test_what_needs_data_still_says_so(subset, structure):
    la = made(subset, structure)
    _, x, _ = CASES["mlp"].make()
    for call in (
        lambda: la(x),
        lambda: la.sample(2),
        lambda: la.log_marginal_likelihood(),
        lambda: la.posterior_precision,
    ):
        with pytest.raises(NotFittedError):
            call()


def test_after_a_fit_the_mean_is_the_map():
    la = made("all", "diag")
    _, x, y = CASES["mlp"].make()
    la.fit([(x, y)])
    assert torch.equal(la.mean, parameters_to_vector(la.model.parameters()).detach())
    density = torch.distributions.Normal(la.mean, la.posterior_scale).log_prob(la.mean + 0.1).sum()
    assert float(la.log_prob(la.mean + 0.1)) == pytest.approx(float(density))
