"""Prior precision and noise together, and grids that go on beyond their ends: against dense algebra and scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import nn

from laplace import Laplace
from laplace.likelihoods import Categorical
from laplace.scoring import score_candidates
from laplace.tuning import prior_precision_grid, score_grid

from .models import loader
from .posteriors import SIX, fitted
from .test_temperature import classifier


def line(n=30, seed=0, noise=0.3):
    """A linear regression with two outputs: weights near the truth, training and validation points."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(truth + 0.1 * torch.randn(2, 4, generator=generator, dtype=torch.float64))

    def points(n):
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        return x, x @ truth.T + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    return model, points(n), points(200)


def regression(structure="full", n=30, **arguments):
    model, (x, y), validation = line(n)
    la = Laplace(model, "regression", "all", structure, **arguments)
    la.fit(loader(x, y, 16))
    return la, (x, y), validation


def evidence(weight, x, y, prior, noise):
    """Laplace's log evidence of a linear regression, exact but for the weights that are not the posterior's mode; in numpy."""
    (n, d), outputs = x.shape, y.shape[1]
    _, log_det = np.linalg.slogdet(x.T @ x / noise**2 / prior + np.eye(d))
    fit = -((y - x @ weight.T) ** 2).sum() / 2 / noise**2 - n * outputs * (math.log(noise) + math.log(2 * math.pi) / 2)
    return fit - outputs * log_det / 2 - prior * (weight**2).sum() / 2


def test_the_evidence_finds_prior_and_noise_together():
    la, (x, y), _ = regression()
    weight = la.model.weight.detach().numpy()
    loss = lambda u: -evidence(weight, x.numpy(), y.numpy(), math.exp(u[0]), math.exp(u[1]))  # noqa: E731
    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})
    la.optimize_prior_precision(tune_noise=True, n_steps=600, lr=0.05)
    assert la.prior_precision.item() == pytest.approx(math.exp(best.x[0]), rel=1e-3)
    assert la.sigma_noise.item() == pytest.approx(math.exp(best.x[1]), rel=1e-3)
    assert 0.2 < la.sigma_noise.item() < 0.5
    assert not la.sigma_noise.requires_grad
    assert float(la.log_marginal_likelihood()) == pytest.approx(-best.fun)


def test_the_noise_stays_where_nobody_asks_for_it():
    la, _, validation = regression()
    la.sigma_noise = 0.8
    la.optimize_prior_precision()
    la.optimize_prior_precision(method="gridsearch", val_loader=[validation], grid_size=5)
    assert la.sigma_noise.item() == 0.8


def loss_at(x_train, weight, x, y, prior, noise):
    covariance = np.linalg.inv(x_train.T @ x_train / noise**2 + prior * np.eye(x_train.shape[1]))
    variance = np.einsum("ni,ij,nj->n", x, covariance, x)[:, None] + noise**2
    return float(np.mean((y - x @ weight.T) ** 2 / variance + np.log(2 * np.pi * variance)) / 2)


@pytest.mark.parametrize("extend", [False, True])
def test_a_grid_finds_prior_and_noise_together(extend):
    la, (x_train, _), (x, y) = regression(n=6)
    weight, x_train, a, b = la.model.weight.detach().numpy(), x_train.numpy(), x.numpy(), y.numpy()

    def best_noise(ratio):
        loss = lambda u: loss_at(x_train, weight, a, b, ratio / math.exp(2 * u), math.exp(u))  # noqa: E731
        return minimize_scalar(loss, bounds=(-4, 3), method="bounded", options={"xatol": 1e-10})

    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader(x, y, 33), grid_size=41, tune_noise=True, extend=extend
    )
    ratio = min(prior_precision_grid(size=41).tolist(), key=lambda value: best_noise(value).fun)
    noise = math.exp(best_noise(ratio).x)
    assert 1e-3 < ratio < 1e3
    assert la.sigma_noise.item() == pytest.approx(noise, rel=1e-6)
    assert la.prior_precision.item() == pytest.approx(ratio / noise**2, rel=1e-6)
    again = loss_at(x_train, weight, a, b, la.prior_precision.item(), la.sigma_noise.item())
    total, n = score_grid(la, [(x, y)], la.prior_precision.double())
    assert float(total) / n == pytest.approx(again, rel=1e-9)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_noise_and_prior_of_every_structure_are_where_the_loss_is_lowest(structure):
    la, _, (x, y) = regression(structure, n=6)
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], tune_noise=True)
    best = {}
    prior, noise = la.prior_precision.item(), la.sigma_noise.item()
    for factor in (0.98, 1.0, 1.02):
        la.sigma_noise = noise * factor
        la.prior_precision = prior / factor**2  # the same in units of the noise's
        total, _ = score_grid(la, [(x, y)], la.prior_precision.double())
        best[factor] = float(total)
    assert best[1.0] < best[0.98] and best[1.0] < best[1.02]


def test_sequences_have_their_noise_too():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(40, 5, 3, dtype=torch.float64)
    y = model(x).detach() + 0.25 * torch.randn(40, 5, 2, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "diag")
    la.fit([(x, y)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], tune_noise=True)
    assert la.sigma_noise.item() == pytest.approx(0.25, rel=0.1)


# --- beyond the ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-4, 4])
@pytest.mark.parametrize("subset, structure", [("last_layer", "kron"), ("last_layer", "full")])
def test_a_grid_goes_on_until_the_best_value_is_inside(subset, structure, power):
    """The last layer's features are scaled, and its weights the other way: so is the best prior precision, squared."""
    found = []
    for size in (1.0, 10.0**power):
        model, x, y = classifier()
        model = nn.Sequential(model[0], model[1], Scaled(size), model[2])
        with torch.no_grad():
            model[3].weight /= size
            model[3].bias.zero_()
        model[3].bias.requires_grad_(False)
        la = Laplace(model, "classification", subset, structure)
        la.fit(loader(x, y, 50))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y, 50), grid_size=41, extend=True)
        found.append(la.prior_precision.item())
    assert 1e-4 < found[0] < 1e4
    assert found[1] / found[0] == pytest.approx(10.0 ** (2 * power), rel=1e-4)


class Scaled(nn.Module):
    """Multiplies by a number."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x * self.size


@pytest.mark.parametrize("subset, structure", SIX)
def test_extended_and_plain_grids_agree_inside(subset, structure):
    model, x, y = classifier()
    found = []
    for extend in (False, True):
        la = Laplace(model, "classification", subset, structure)
        la.fit(loader(x, y, 50))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y, 50), grid_size=81, extend=extend)
        found.append(la.prior_precision.item())
    if 1e-4 < found[0] < 1e4:
        assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_where_no_prior_helps_that_is_said():
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False).double()
    x = torch.randn(40, 3, dtype=torch.float64).repeat_interleave(50, 0)
    shares = model(x[::50]).detach().softmax(-1).cumsum(-1)
    y = ((torch.arange(50) + 0.5)[None, :, None] / 50 >= shares[:, None]).sum(-1).clamp(max=2).flatten()
    la = Laplace(model, "classification", "all", "full")
    la.fit([(x[:10], y[:10])])
    with pytest.warns(
        UserWarning, match="the predictive is that of the MAP there, so that no prior precision makes it better"
    ):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], extend=True)
    assert la.prior_precision.item() > 100


class Passes(list):
    """Batches that count how often they were gone through."""

    count = 0

    def __iter__(self):
        self.count += 1
        return super().__iter__()


def test_whether_a_prior_moves_anything_is_asked_once_per_batch(monkeypatch):
    """On a GPU every answer waits for all that was asked of the device before."""
    moves, asked = Categorical.moves, []
    monkeypatch.setattr(Categorical, "moves", lambda *args: asked.append(None) or moves(*args))
    la, batch = Laplace(nn.Linear(3, 2), "classification"), (torch.randn(8, 3), torch.arange(8) % 2)
    la.fit([batch])
    scored = score_candidates(la, [batch, batch], [0.1, 1.0, 10.0])
    assert len(asked) == 2 and not scored.fixed


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_where_nothing_depends_on_the_prior_that_is_said_after_two_passes(likelihood):
    model = nn.Sequential(nn.Linear(3, 2), Scaled(0.0))
    x = torch.randn(40, 3)
    y = torch.arange(40) % 2 if likelihood == "classification" else torch.randn(40, 2)
    la = Laplace(model, likelihood, "all", "kron")
    la.fit([(x, y)])
    batches = Passes([(x, y)])
    with pytest.warns(UserWarning, match="the loss does not depend on it"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=batches, extend=True, grid_size=41, tune_noise=likelihood == "regression"
        )
    assert batches.count == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tune_noise": True, "likelihood": "classification"}, "tune_noise=True has no meaning for classification"),
        ({"tune_noise": True, "method": "gridsearch", "pred_type": "nn"}, "use method='marglik'"),
        ({"tune_noise": True, "method": "gridsearch", "loss": lambda *a: 0.0}, "leave out loss"),
        ({"extend": True}, "extend=True is for method='gridsearch'"),
        ({"extend": True, "method": "gridsearch", "loss": lambda *a: 0.0}, "leave out loss"),
        ({"tune_noise": True, "method": "gridsearch", "val_loader": []}, "validation data is empty"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments, message):
    if arguments.pop("likelihood", "") == "classification":
        la = fitted(structure="diag")
    else:
        la = regression("diag")[0]
    with pytest.raises(ValueError, match=message):
        la.optimize_prior_precision(**{"val_loader": [], **arguments})
    assert (la.prior_precision.item(), la.sigma_noise.item()) == (1.0, 1.0)
