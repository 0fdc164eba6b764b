"""Predictives against dense algebra, the formulas of the papers, quadrature, and manual sampling."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn.utils import vector_to_parameters

from laplace import Laplace
from laplace.curvature import backend_class
from laplace.enums import LinkApprox
from laplace.likelihoods.links import softmax_link
from laplace.predictive import glm_distribution

from . import naive
from .models import CASES, loader
from .posteriors import COMBINATIONS, SIX, STRUCTURES, close, dense_precision, fitted, prior_of
from .test_curvature import last_layer_of


def reference(la, model, x, subset="all"):
    """Outputs and their covariance ``J P^-1 J^T`` from naive Jacobians and a dense inverse."""
    f = model(x).detach()
    net, inputs = (model, x) if subset == "all" else last_layer_of(model, x)
    return f, naive.glm_covariance(naive.jacobians(net, inputs), dense_precision(la))


# --- the Gaussian over outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_output_covariance_equals_dense_algebra(name, structure):
    """Every kind of layer, without a Jacobian."""
    case = CASES[name]
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, "all", structure)
    la.fit(loader(x, y))
    la.prior_precision = prior_of(la, "layerwise")
    f, covariance = reference(la, model, x)
    mean, variance = glm_distribution(la, x)
    close(mean, f)
    close(variance, covariance)
    close(glm_distribution(la, x, diagonal=True)[1], covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("subset, structure, prior", COMBINATIONS)
@pytest.mark.parametrize("backend", ["native", "curvlinops"])
def test_regression_predictive(backend, subset, structure, prior):
    model, x, y = CASES["regression"].make()
    la = Laplace(
        model,
        "regression",
        subset,
        structure,
        sigma_noise=0.5,
        temperature=1.3,
        backend=backend_class(backend, "ggn")[0],
    )
    la.fit(loader(x, y))
    for p in (prior, "scalar"):  # the second pass meets caches of the first
        la.prior_precision = prior_of(la, p)
        f, covariance = reference(la, model, x, subset)
        mean, variance = la(x)
        close(mean, f)
        close(variance, covariance)
        close(la(x, diagonal_output=True)[1], covariance.diagonal(dim1=1, dim2=2))
    net, inputs = (model, x) if subset == "all" else last_layer_of(model, x)
    rows = naive.jacobians(net, inputs).flatten(0, 1)
    mean, joint = la(x, joint=True)
    close(mean, f.flatten())
    close(joint, rows @ torch.linalg.inv(dense_precision(la)) @ rows.T)


# --- links -----------------------------------------------------------------------------------------------------------


def probit(f, covariance):
    """MacKay (1992), per logit: softmax(f / sqrt(1 + pi/8 var))."""
    return torch.softmax(f / torch.sqrt(1 + torch.pi / 8 * covariance.diagonal(dim1=1, dim2=2)), 1)


def bridge(f, covariance, normalise):
    """Hobbhahn et al. (2022): zero-sum correction, then alpha, example by example."""
    rows = []
    for mu, sigma in zip(f, covariance, strict=True):
        k, ones = len(mu), torch.ones(len(mu), dtype=mu.dtype)
        total = ones @ sigma @ ones
        mu = mu - sigma @ ones * (ones @ mu) / total
        sigma = sigma - torch.outer(sigma @ ones, ones @ sigma) / total
        var = sigma.diagonal()
        if normalise:
            c = (k / 2) ** 0.5 / var.mean()
            mu, var = mu * c**0.5, var * c
        alpha = (1 - 2 / k + torch.exp(mu) / k**2 * torch.exp(-mu).sum()) / var
        rows.append(alpha / alpha.sum())
    return torch.stack(rows)


def integral(f, covariance, nodes=32):
    """Mean of the softmax under the Gaussian by Gauss-Hermite quadrature over all logits."""
    points, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    k = f.shape[1]
    grid = torch.cartesian_prod(*[points] * k)
    weight = torch.cartesian_prod(*[weights] * k).prod(1)
    rows = []
    for mu, sigma in zip(f, covariance, strict=True):
        root = torch.linalg.cholesky(sigma + 1e-12 * torch.eye(k, dtype=sigma.dtype))
        rows.append((torch.softmax(mu + grid @ root.T, 1) * weight[:, None]).sum(0) / weight.sum())
    return torch.stack(rows)


LINKS = {
    "probit": probit,
    "bridge": lambda f, v: bridge(f, v, False),
    "bridge_norm": lambda f, v: bridge(f, v, True),
}


@pytest.mark.parametrize("subset, structure, prior", COMBINATIONS)
@pytest.mark.parametrize("link", LINKS)
def test_links_are_the_papers_formulas(link, subset, structure, prior):
    for name in ("mlp", "two-classes", "ten-classes"):
        model, x, y = CASES[name].make()
        la = Laplace(model, "classification", subset, structure)
        la.fit(loader(x, y))
        la.prior_precision = prior_of(la, prior)
        f, covariance = reference(la, model, x, subset)
        close(la(x, link_approx=link), LINKS[link](f, covariance))
        only_diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
        close(la(x, link_approx=link, diagonal_output=True), LINKS[link](f, only_diagonal))


@pytest.mark.parametrize("subset, structure", SIX)
def test_mc_converges_to_the_integral(subset, structure):
    """A probability has standard deviation at most 1/2, so 40000 draws err by at most 0.0025 per unit: 4 units."""
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", subset, structure)
    la.fit(loader(x, y))
    f, covariance = reference(la, model, x, subset)
    draw = lambda **kw: la(x, link_approx="mc", n_samples=40000, generator=torch.Generator().manual_seed(0), **kw)  # noqa: E731
    assert torch.allclose(draw(), integral(f, covariance), atol=0.01)
    only_diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    assert torch.allclose(draw(diagonal_output=True), integral(f, only_diagonal), atol=0.01)
    assert torch.equal(draw(), draw())


def test_links_approximate_the_integral():
    """All links are approximations of one integral; for moderate variances they agree to a few per cent."""
    model, x, y = CASES["mlp"].make()
    la = fitted(structure="full", prior_precision=10.0)
    truth = integral(*reference(la, model, x))
    for link in ("probit", "mc"):
        assert torch.allclose(la(x, link_approx=link, n_samples=20000), truth, atol=0.05), link


def test_more_prior_precision_means_less_uncertainty():
    model, x, _ = CASES["mlp"].make()
    la = fitted(structure="kron")
    for link in ("probit", "mc"):
        la.prior_precision = 1e10
        assert torch.allclose(la(x, link_approx=link), model(x).softmax(-1), atol=1e-3)
    la.prior_precision = 1e-10
    assert float(la(x).max()) < float(model(x).detach().softmax(-1).max())


def test_bridge_survives_large_logits():
    model, x, _ = CASES["mlp"].make()
    la = fitted(structure="kron", prior_precision=1e-3)
    for link in ("bridge", "bridge_norm", "probit", "mc"):
        p = la(x * 1e4, link_approx=link)
        assert torch.isfinite(p).all(), link
        assert torch.allclose(p.sum(-1), torch.ones(5, dtype=p.dtype)), link


@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_with_positions(structure):
    model, x, y = CASES["sequence-output"].make()
    la = Laplace(model, "classification", "all", structure)
    la.fit(loader(x, y))
    _, covariance = reference(la, model, x)
    f = model(x).detach()
    variance = covariance.diagonal(dim1=1, dim2=2).reshape(f.shape)
    close(la(x), torch.softmax(f / torch.sqrt(1 + torch.pi / 8 * variance), -1))
    assert la(x, link_approx="mc", n_samples=5).shape == f.shape
    assert la.predictive_samples(x, n_samples=5).shape == (5, *f.shape)
    assert la(x, pred_type="nn", link_approx="mc", n_samples=5).shape == f.shape
    with pytest.raises(ValueError, match=r"'bridge' needs outputs \(batch, classes\)"):
        la(x, link_approx="bridge")


def test_last_layer_of_outputs_with_positions():
    model, x, y = CASES["sequence-output"].make()
    la = Laplace(model, "classification", "last_layer", "full")
    la.fit(loader(x, y))
    _, covariance = reference(la, model, x, "last_layer")
    variance = covariance.diagonal(dim1=1, dim2=2).reshape(y.shape + (3,))
    close(la(x), torch.softmax(model(x).detach() / torch.sqrt(1 + torch.pi / 8 * variance), -1))


# --- sampled networks and predictive samples -------------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("name", ["mlp", "regression", "tied", "normed"])
def test_nn_predictive_equals_manual_forward_passes(name, subset, structure):
    case = CASES[name]
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, subset, structure)
    la.fit(loader(x, y))
    outputs = []
    for vector in la.sample(20, torch.Generator().manual_seed(0)):
        other = copy.deepcopy(model)
        layer, _ = last_layer_of(other, x)
        vector_to_parameters(vector, (other if subset == "all" else layer).parameters())
        outputs.append(other(x).detach())
    outputs = torch.stack(outputs)
    options = {"pred_type": "nn", "n_samples": 20}
    ours = la(x, link_approx="mc", generator=torch.Generator().manual_seed(0), **options)
    draws = la.predictive_samples(x, generator=torch.Generator().manual_seed(0), **options)
    if case.likelihood == "regression":
        close(ours[0], outputs.mean(0))
        close(ours[1], outputs.var(0))
        close(draws, outputs)
    else:
        close(ours, outputs.softmax(-1).mean(0))
        close(draws, outputs.softmax(-1))


@pytest.mark.parametrize("subset, structure", SIX)
def test_predictive_samples_have_the_gaussian_s_moments(subset, structure):
    """Means within 5 sd/sqrt(n), covariances within 5 sqrt((C_ii C_jj + C_ij^2) / n)."""
    n = 20000
    model, x, y = CASES["regression"].make()
    la = Laplace(model, "regression", subset, structure)
    la.fit(loader(x, y))
    f, covariance = reference(la, model, x, subset)
    for diagonal in (False, True):
        draws = la.predictive_samples(
            x, n_samples=n, diagonal_output=diagonal, generator=torch.Generator().manual_seed(0)
        )
        assert draws.shape == (n, 5, 2)
        for i in range(5):
            c = torch.diag(covariance[i].diagonal()) if diagonal else covariance[i]
            variance = c.diagonal()
            assert float(((draws[:, i].mean(0) - f[i]).abs() / (variance / n).sqrt()).max()) < 5
            unit = ((torch.outer(variance, variance) + c**2) / n).sqrt()
            assert float(((torch.cov(draws[:, i].T) - c).abs() / unit).max()) < 5


def test_predictive_samples_of_a_classifier_are_probabilities():
    _, x, _ = CASES["mlp"].make()
    la = fitted(structure="kron")
    draws = la.predictive_samples(x, n_samples=50, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(draws.sum(-1), torch.ones(50, 5, dtype=torch.float64))
    close(draws.mean(0), la(x, link_approx="mc", n_samples=50, generator=torch.Generator().manual_seed(0)))


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure", SIX)
def test_enable_backprop_gives_gradients_of_the_inputs(subset, structure):
    model, x, y = CASES["mlp"].make()
    plain, through = (Laplace(model, "classification", subset, structure, enable_backprop=b) for b in (False, True))
    for la in (plain, through):
        la.fit(loader(x, y))
    inputs = x.clone().requires_grad_(True)
    p = through(inputs)
    close(p, plain(x))
    (gradient,) = torch.autograd.grad(p[:, 0].sum(), inputs)
    step = torch.zeros_like(x)
    step[:, 1] = 1e-6
    numerical = (plain(x + step)[:, 0] - plain(x - step)[:, 0]) / 2e-6
    assert torch.allclose(gradient[:, 1], numerical, rtol=1e-5, atol=1e-8)


def test_reward_modelling_fits_as_classification_and_predicts_as_regression():
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "reward_modeling", "all", "kron")
    la.fit(loader(x, y))
    classifier = fitted(structure="kron")
    close(la.H_facs.to_matrix(), classifier.H_facs.to_matrix())
    f, covariance = reference(la, model, x)
    mean, variance = la(x)
    close(mean, f)
    close(variance, covariance)
    close(la(x, fitting=True), classifier(x))


def test_prediction_works_without_gradients_and_in_batches():
    _, x, _ = CASES["mlp"].make()
    la = fitted(structure="kron")
    whole = la(x)
    with torch.no_grad():
        assert torch.allclose(la(x), whole)
    assert not whole.requires_grad
    assert torch.allclose(torch.cat([la(x[:2]), la(x[2:])]), whole)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"pred_type": "glmm"}, "pred_type='glmm' is unknown; valid values are 'glm', 'nn', 'gp'"),
        ({"pred_type": "gp"}, "valid here are 'glm' and 'nn'"),
        ({"link_approx": "prob"}, "valid values are 'mc', 'probit', 'bridge', 'bridge_norm'"),
        ({"pred_type": "nn"}, "only link_approx='mc' is possible, not 'probit'"),
        ({"joint": True}, "joint=True is for regression"),
        ({"attention_mask": 1}, r"Unknown arguments \['attention_mask'\]"),
    ],
)
def test_impossible_predictives_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fitted(structure="kron")(CASES["mlp"].make()[1], **kwargs)


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
def test_the_bridge_stands_variance_that_all_logits_share(link):
    """It cancels, so float32 logits under a shared variance of 1e4 have the probabilities of float64 ones."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    root = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    covariance = (root @ root.mT + 1e5).float()
    truth = softmax_link(f, covariance.double(), LinkApprox(link)).exp()
    found = softmax_link(f.float(), covariance, LinkApprox(link)).exp()
    assert found.dtype is torch.float32
    assert float((found - truth).abs().max()) < 1e-6
