"""The Gaussian process of the linearised network against the dense posterior, and against its own definition."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from laplace import FunctionalLaplace, FunctionalLLLaplace, Laplace, NonFiniteError, NotFittedError
from laplace.curvature import backend_class
from laplace.predictive import glm_distribution

from . import naive
from .models import CASES, loader, mlp

NAMES = [n for n, c in CASES.items() if c.likelihood == "regression"] + [
    "mlp", "two-classes", "no-bias", "frozen", "stride-padding", "sequence", "sequence-output", "twice", "tied", "normed",
    "embedding", "grouped",
]  # fmt: skip


def close(value, truth, tolerance=1e-8):
    assert naive.relative_error(value, truth) < tolerance


def pair(name, subset="all", estimator="ggn", **kwargs):
    """A GP over all of the data, the dense posterior, and inputs."""
    case = CASES[name]
    model, x, y = case.make(n=7)
    cls, options = backend_class("native", estimator)
    if estimator == "mc":
        options = {**options, "seed": 3}
    both = []
    for structure in ("gp", "full"):
        la = Laplace(
            model,
            case.likelihood,
            subset,
            structure,
            prior_precision=1.7,
            backend=cls,
            backend_kwargs=options,
            **kwargs,
        )
        la.fit(loader(x, y, 3))
        both.append(la)
    return *both, x


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", NAMES)
def test_with_all_of_the_data_it_is_the_dense_posterior(name, subset):
    gp, full, x = pair(name, subset, temperature=1.3)
    for prior in (1.7, 0.02, 50.0):
        gp.prior_precision = full.prior_precision = prior
        for diagonal in (False, True):
            for one, two in zip(glm_distribution(gp, x, diagonal), glm_distribution(full, x, diagonal), strict=True):
                close(one, two)
        close(gp.log_marginal_likelihood(), full.log_marginal_likelihood())
        close(gp.log_det_posterior_precision, full.log_det_posterior_precision)
    rows = full.backend.jacobians(x)[0]
    rows = rows.reshape(len(x), -1, rows.shape[-1])
    close(gp.functional_variance(rows), full.functional_variance(rows))
    close(gp.functional_covariance(rows.flatten(0, 1)), full.functional_covariance(rows.flatten(0, 1)))


@pytest.mark.parametrize("estimator", ["ef", "mc"])
def test_other_estimators_too(estimator):
    gp, full, x = pair("mlp", estimator=estimator)
    if estimator == "mc":  # the subset's own indices seed the draws, and with all of the data these are the data's
        assert gp.n_data == full.n_data
    for one, two in zip(glm_distribution(gp, x), glm_distribution(full, x), strict=True):
        close(one, two)


@pytest.mark.parametrize("name", ["regression", "sequence-regression"])
def test_regression_with_noise(name):
    gp, full, x = pair(name, sigma_noise=0.4)
    for one, two in zip(gp(x), full(x), strict=True):
        close(one, two)
    for one, two in zip(gp(x, joint=True), full(x, joint=True), strict=True):
        close(one, two)
    full.sigma_noise = gp.sigma_noise = 2.0
    close(gp(x)[1], full(x)[1])


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_class_probabilities(link):
    gp, full, x = pair("mlp")
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    close(gp(x, link_approx=link, generator=generators[0]), full(x, link_approx=link, generator=generators[1]), 1e-7)


def test_it_is_a_gaussian_process():
    """A linear network: the textbook GP regression with a linear kernel, evidence included."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1, bias=False).double(), *torch.randn(2, 9, 3, dtype=torch.float64)
    y = y[:, :1]
    delta, sigma = 1.9, 0.7
    precision = x.T @ x / sigma**2 + delta * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(precision, x.T @ y / sigma**2).T)
    la = Laplace(model, "regression", "all", "gp", prior_precision=delta, sigma_noise=sigma)
    la.fit(loader(x, y, 4))
    k = x @ x.T / delta
    noisy = k + sigma**2 * torch.eye(9, dtype=torch.float64)
    marginal = MultivariateNormal(torch.zeros(9, dtype=torch.float64), noisy)
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(marginal.log_prob(y[:, 0])), rel=1e-10)
    new = torch.randn(4, 3, dtype=torch.float64)
    cross = new @ x.T / delta
    mean, covariance = la(new, joint=True)
    close(mean, cross @ torch.linalg.solve(noisy, y[:, 0]))
    close(covariance, new @ new.T / delta - cross @ torch.linalg.solve(noisy, cross.T))


# --- subsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loader", "shuffled", "list"])
@pytest.mark.parametrize("name", ["mlp", "regression"])
def test_a_subset_counts_as_often_as_it_stands_for_data(name, kind):
    """P = N/M of the subset's GGN + prior; the log likelihood is that of all data."""
    case = CASES[name]
    model, x, y = case.make(n=9)
    data = loader(x, y, 2)
    if kind == "shuffled":
        data = torch.utils.data.DataLoader(data.dataset, batch_size=2, shuffle=True)
    gp = FunctionalLaplace(model, case.likelihood, 4, prior_precision=0.8, seed=1)
    gp.fit(list(data) if kind == "list" else data)
    own = torch.cat([b[0] for b in gp._subset])
    assert len(own) == 4 and all(any(torch.equal(a, b) for b in x) for a in own)
    h = naive.full(model, own, y[:4], case.likelihood, "ggn") * 9 / 4
    precision = h + 0.8 * torch.eye(len(h), dtype=torch.float64)
    close(glm_distribution(gp, x)[1], naive.glm_covariance(naive.jacobians(model, x), precision))
    close(gp.log_det_posterior_precision, torch.logdet(precision))
    full = Laplace(model, case.likelihood, "all", "full")
    full.fit(data)
    close(gp.log_likelihood, full.log_likelihood)


def test_the_seed_chooses_the_subset():
    model, x, y = CASES["mlp"].make(n=9)

    def chosen(seed):
        gp = FunctionalLaplace(model, "classification", 3, seed=seed)
        gp.fit(loader(x, y, 2))
        return torch.cat([b[0] for b in gp._subset])

    assert torch.equal(chosen(0), chosen(0))
    assert any(not torch.equal(chosen(0), chosen(seed)) for seed in (1, 2, 3))


def test_the_scaled_subset_is_nearer_to_all_data_than_a_scaled_prior():
    """laplace-torch 0.3 multiplies the prior precision by N/M instead of the curvature; this is why we do not."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 60, dtype=torch.float64)[:, None]
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    full = Laplace(model, "regression", "all", "full", sigma_noise=0.3)
    full.fit(loader(x, x.sin(), 20))
    gp = FunctionalLaplace(model, "regression", 20, sigma_noise=0.3)
    gp.fit(loader(x, x.sin(), 20))
    new = torch.linspace(-6, 6, 50, dtype=torch.float64)[:, None]
    own = torch.cat([b[0] for b in gp._subset])
    h = naive.full(model, own, own, "regression", "ggn") / 0.3**2
    theirs = naive.glm_covariance(naive.jacobians(model, new), h + 3 * torch.eye(len(h), dtype=torch.float64))
    truth = full(new)[1]
    error = ((gp(new)[1] / truth).log().abs().mean(), (theirs / truth).log().abs().mean())
    assert error[0] < 0.5 * error[1]


# --- independent outputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", ["mlp", "regression", "sequence", "normed"])
def test_independent_outputs_are_processes_of_their_own(name, subset):
    case = CASES[name]
    model, x, y = case.make(n=6)
    la = Laplace(model, case.likelihood, subset, "gp", prior_precision=0.8, independent_outputs=True)
    la.fit(loader(x, y, 4))
    js = la.backend.jacobians(x)[0]
    f = model(x).detach()
    variances, ratio = [], 0.0
    for c in range(js.shape[1]):
        noise = torch.stack([naive.output_hessian(row, case.likelihood)[c, c] for row in f])
        j = js[:, c]
        precision = (j * noise[:, None]).T @ j + 0.8 * torch.eye(j.shape[1], dtype=torch.float64)
        variances.append(j @ torch.linalg.inv(precision) @ j.T)
        ratio = ratio + torch.logdet(precision / 0.8)
    expected = torch.stack([v.diagonal() for v in variances], 1)
    close(glm_distribution(la, x, diagonal=True)[1], expected)
    close(glm_distribution(la, x)[1], torch.diag_embed(expected))
    close(la.functional_variance(js), torch.diag_embed(expected))
    close(la.log_det_ratio, ratio)
    joint = la.functional_covariance(js.flatten(0, 1)).reshape(6, js.shape[1], 6, js.shape[1])
    for c, v in enumerate(variances):
        close(joint[:, c, :, c], v)
        assert float(joint[:, c, :, c - 1].abs().max()) == 0


# --- tuning, samples, gradients --------------------------------------------------------------------------------------


def test_evidence_is_differentiable_and_tunes_like_the_dense_one():
    gp, full, _ = pair("regression")
    arguments = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.6, 0.5)]
    assert torch.autograd.gradcheck(lambda p, s: gp.log_marginal_likelihood(p, s), arguments)
    gp.sigma_noise = full.sigma_noise = 0.5
    gp.optimize_prior_precision(n_steps=20)
    full.optimize_prior_precision(n_steps=20)
    close(gp.prior_precision, full.prior_precision)


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_grid_search_scores_like_the_dense_one(link):
    gp, full, x = pair("mlp")
    _, x, y = CASES["mlp"].make(n=8, seed=3)
    for la in (gp, full):
        la.optimize_prior_precision(
            la.pred_types[0], "gridsearch", val_loader=loader(x, y), grid_size=7, link_approx=link, n_samples=20
        )
    assert torch.equal(gp.prior_precision, full.prior_precision)


def test_samples_follow_the_predictive():
    gp, _, x = pair("regression")
    mean, covariance = gp(x)
    draws = gp.predictive_samples(x, n_samples=20_000, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, *mean.shape)
    assert torch.allclose(draws.mean(0), mean, atol=0.05 * float(covariance.abs().max().sqrt()) * 3)
    centred = draws - mean
    close(torch.einsum("sbc,sbd->bcd", centred, centred) / len(draws), covariance, 0.05)
    alone = gp.functional_samples(x, n_samples=20_000, diagonal_output=True) - mean
    mixed = torch.einsum("sbc,sbd->bcd", alone, alone)[:, 0, 1] / len(alone)
    assert float(mixed.abs().max()) < 0.05 * float(covariance.abs().max())


def test_gradients_reach_the_inputs():
    model, x, y = CASES["regression"].make(n=6)
    la = Laplace(model, "regression", "all", "gp", enable_backprop=True)
    la.fit(loader(x, y, 4))
    assert torch.autograd.gradcheck(lambda z: la(z)[1], (x[:2].clone().requires_grad_(True),))


# --- state and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_state_round_trips_without_pickle(subset):
    case = CASES["mlp"]
    model, x, y = case.make(n=8)
    la = Laplace(model, "classification", subset, "gp", n_subset=5)
    la.fit(loader(x, y, 3))
    la.prior_precision = 3.3
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    other = Laplace(copy.deepcopy(model), "classification", subset, "gp", n_subset=5)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    close(other(x), la(x), 1e-12)
    close(other.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-12)
    independent = Laplace(copy.deepcopy(model), "classification", subset, "gp", independent_outputs=True)
    with pytest.raises(ValueError, match="independent_outputs=False"):
        independent.load_state_dict(la.state_dict())


def test_sequences_of_different_lengths_share_a_kernel():
    """Batches of a padded loader differ in length; positions that are not there add nothing."""
    case = CASES["sequence"]
    model, x, y = case.make(n=3)
    batches = [(torch.cat([x, x], 1), y), (x, y)]
    gp = Laplace(model, "classification", "all", "gp")
    full = Laplace(model, "classification", "all", "full")
    for la in (gp, full):
        la.fit(batches)
    close(glm_distribution(gp, x)[1], glm_distribution(full, x)[1])


def test_classes_and_structures():
    gp, _, _ = pair("mlp")
    last, _, _ = pair("mlp", "last_layer")
    assert type(gp) is FunctionalLaplace and type(last) is FunctionalLLLaplace
    assert {row[1] for row in gp.coverage} == {"gp"}


def fit_again(la, x, y):
    la.fit(loader(x, y), override=False)


REFUSED = {
    "not additive": (fit_again, "fit\\(override=False\\) is not possible for a functional"),
    "iterator": (lambda la, x, y: la.fit(iter(loader(x, y))), "not an iterator"),
    "empty": (lambda la, x, y: la.fit([]), "empty"),
    "glm": (lambda la, x, y: la(x, pred_type="glm"), "belongs to parametric posteriors; valid here is 'gp'"),
    "nn": (lambda la, x, y: la(x, pred_type="nn", link_approx="mc"), "valid here is 'gp'"),
    "samples": (lambda la, x, y: la.predictive_samples(x, "nn"), "valid here is 'gp'"),
    "weights": (lambda la, x, y: la.sample(), "sample\\(\\) is not possible"),
    "precision": (lambda la, x, y: la.posterior_precision, "no distribution over weights"),
    "sums": (lambda la, x, y: la.zero_sums(), "zero_sums\\(\\) is not possible"),
    "layerwise": (lambda la, x, y: la.optimize_prior_precision(prior_structure="layerwise"), "scalar prior precision"),
    "diag prior": (lambda la, x, y: setattr(la, "prior_precision", torch.ones(la.n_params)), "scalar prior precision"),
    "too many": (lambda la, x, y: FunctionalLaplace(la.model, "classification", 99).fit(loader(x, y)), "99 is more than the 7"),
    "none": (lambda la, x, y: FunctionalLaplace(la.model, "classification", 0), "n_subset=0"),
    "reward": (lambda la, x, y: FunctionalLaplace(la.model, "reward_modeling"), "valid hessian_structures are 'kron' and"),
    "labels": (lambda la, x, y: la.fit(loader(x, y + 7)), "out of range"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_process_cannot_do(kind):
    gp, _, x = pair("mlp")
    y = CASES["mlp"].make(n=7)[2]
    before = gp(x)
    action, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        action(gp, x, y)
    assert torch.equal(gp(x), before)


def test_before_fit_and_bad_examples():
    model, x, y = CASES["mlp"].make()
    la = Laplace(mlp(), "classification", "all", "gp")
    with pytest.raises(NotFittedError, match="call fit"):
        la(x)
    x[3] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        Laplace(model, "classification", "all", "gp").fit(loader(x, y))
    assert caught.value.examples == [3]
    from laplace.curvature import NativeHessian

    with pytest.raises(ValueError, match="needs a GGN or EF backend, not NativeHessian"):
        Laplace(model, "classification", "all", "gp", backend=NativeHessian).fit(loader(x, y))
