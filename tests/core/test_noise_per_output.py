"""A noise of its own for every output: the posterior of outputs and targets in units of it, and what learns it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from laplace import Laplace
from laplace.curvature import NativeEF, NativeGGN
from laplace.likelihoods import GaussianPerOutput
from laplace.likelihoods.conformance import LikelihoodConformance
from laplace.tuning import score_grid
from laplace.utils import residual_noise

from .models import loader
from .posteriors import SIX, close

NOISE = torch.tensor([0.2, 3.0], dtype=torch.float64)


class TestTheLaw(LikelihoodConformance):
    def make_likelihood(self):
        return GaussianPerOutput([0.2, 3.0])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def whitened():
    """The network whose outputs are divided by the noise, as weights of its last layer."""
    model = network()
    with torch.no_grad():
        model[2].weight /= NOISE[:, None]
        model[2].bias /= NOISE
    return model


def data(n=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, network()(x).detach() + NOISE * torch.randn(n, 2, generator=generator, dtype=torch.float64)


class Divided(nn.Module):
    """A network with its outputs divided, at the same weights."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x) / NOISE


def both(structure, subset="all", backend=NativeGGN):
    """Our posterior, and that of the divided network by one noise of 1."""
    x, y = data()
    ours = Laplace(network(), GaussianPerOutput(NOISE), subset, structure, backend=backend, prior_precision=0.7)
    ours.fit(loader(x, y, 16))
    one = Laplace(Divided(), "regression", subset, structure, backend=backend, prior_precision=0.7)
    one.fit(loader(x, y / NOISE, 16))
    return ours, one


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("backend", [NativeGGN, NativeEF])
def test_it_is_the_posterior_of_the_divided_network(structure, backend):
    ours, one = both(structure, backend=backend)
    close(ours.H, one.H, 1e-10)
    x, _ = data(5, 2)
    (mean, covariance), (divided, of_divided) = ours(x), one(x)
    close(mean, divided * NOISE, 1e-10)
    close(covariance, of_divided * NOISE[:, None] * NOISE, 1e-10)
    # a density of y is that of y / s over the product of the noises
    expected = one.log_marginal_likelihood(sigma_noise=torch.tensor(1.3)) - 40 * NOISE.log().sum()
    close(ours.log_marginal_likelihood(sigma_noise=torch.tensor(1.3)), expected, 1e-10)


@pytest.mark.parametrize("subset, structure", SIX)
def test_every_structure_scores_the_gaussians_with_their_noises(subset, structure):
    x, y = data()
    la = Laplace(network(), GaussianPerOutput(NOISE), subset, structure)
    la.fit(loader(x, y, 16))
    la.sigma_noise, la.prior_precision = 1.4, 2.0
    x, y = data(30, 2)
    mean, covariance = la(x)
    deviation = (covariance.diagonal(dim1=1, dim2=2) + (1.4 * NOISE) ** 2).sqrt()
    truth = -Normal(mean, deviation).log_prob(y).sum()
    total, n = score_grid(la, loader(x, y, 7), torch.tensor([2.0], dtype=torch.float64))
    assert n == 60 and float(total) == pytest.approx(float(truth), rel=1e-9)
    law = la.likelihood_object
    close(law.scores((mean, covariance), y, 1.4)["nll"].mean() * 2 * 30, truth)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y, 7), tune_noise=True, extend=False)
    prior, sigma = la.prior_precision.item(), la.sigma_noise.item()
    losses = {}
    for factor in (0.98, 1.0, 1.02):
        la.sigma_noise = sigma * factor
        losses[factor] = float(score_grid(la, [(x, y)], torch.tensor([prior / factor**2], dtype=torch.float64))[0])
    assert losses[1.0] < losses[0.98] and losses[1.0] < losses[1.02]


def test_the_last_layers_kronecker_factors_are_those_of_the_whitened_one():
    x, y = data()
    ours = Laplace(network(), GaussianPerOutput(NOISE), "last_layer", "kron")
    ours.fit(loader(x, y, 16))
    one = Laplace(whitened(), "regression", "last_layer", "kron")
    one.fit(loader(x, y / NOISE, 16))
    scale = NOISE[:, None] * NOISE
    for a, b in zip(ours.H_facs.kfacs, one.H_facs.kfacs, strict=True):
        close(a[0] * scale, b[0], 1e-9)


def test_the_noise_is_learned_from_the_residuals():
    x, y = data(4000, 5)
    found = residual_noise(network(), loader(x, y, 100))
    assert torch.allclose(found, NOISE, rtol=0.05)
    close(found, (network()(x) - y).square().mean(0).sqrt())
    law = GaussianPerOutput(found)
    la = Laplace(network(), law, "all", "kron")
    la.fit(loader(x, y, 100))
    la.optimize_prior_precision(tune_noise=True)
    assert la.sigma_noise.item() == pytest.approx(1, rel=0.03)
    one = Laplace(network(), "regression", "all", "kron")
    one.fit(loader(x, y, 100))
    one.optimize_prior_precision(tune_noise=True)
    assert float(la.log_marginal_likelihood()) > float(one.log_marginal_likelihood()) + 1000


def test_sequences_count_every_position():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(20, 5, 3, dtype=torch.float64)
    y = model(x).detach() + NOISE * torch.randn(20, 5, 2, dtype=torch.float64)
    la = Laplace(model, GaussianPerOutput(NOISE), "all", "full", prior_precision=1e9)
    la.fit([(x, y)])
    truth = Normal(model(x), 1.2 * NOISE).log_prob(y).sum()
    la.sigma_noise = 1.2
    close(la.log_likelihood, truth.detach(), 1e-9)
    close(residual_noise(model, [(x, y)]), (model(x) - y).square().mean((0, 1)).sqrt().detach())


@pytest.mark.parametrize("noise", [[], [0.0, 1.0], [1.0, -1.0], [1.0, math.inf], [math.nan]])
def test_noises_that_are_none_are_refused(noise):
    with pytest.raises(ValueError, match="must be one positive and finite number for every output"):
        GaussianPerOutput(noise)


def test_mistakes_name_what_to_do():
    x, y = data()
    la = Laplace(network(), GaussianPerOutput([1.0, 2.0, 3.0]), "all", "diag")
    with pytest.raises(ValueError, match="The model has 2 outputs, but there are 3 noises"):
        la.fit([(x, y)])
    la = Laplace(network(), "regression", "all", "diag")
    with pytest.raises(
        ValueError, match=r"has shape \(2,\).*likelihood=laplace.likelihoods.GaussianPerOutput\(\[0.*, .*\]\) in place"
    ):
        la.sigma_noise = NOISE
    with pytest.raises(ValueError, match="The data loader is empty"):
        residual_noise(network(), [])
    with pytest.raises(ValueError, match=r"The residuals of outputs \[0, 1\] are all zero"):
        residual_noise(network(), [(x, network()(x).detach())])
    with pytest.raises(ValueError, match="Targets of shape"):
        residual_noise(network(), [(x, y[:, :1])])
