"""Posteriors: closed forms, dense algebra, evidence and samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from laplace import Laplace

from . import naive
from .models import CASES, loader
from .posteriors import COMBINATIONS, SIX, close, dense_curvature, dense_precision, fitted, prior_of

# --- closed forms ----------------------------------------------------------------------------------------------------


def linear_regression(bias, sigma, delta, prior_mean):
    """Data, and a linear layer whose weights are the exact posterior mean."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=bias).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    rows = [torch.kron(torch.eye(2, dtype=torch.float64), xi) for xi in x]
    if bias:
        rows = [torch.cat([r, torch.eye(2, dtype=torch.float64)], 1) for r in rows]
    design = torch.cat(rows)
    precision = design.T @ design / sigma**2 + delta * torch.eye(design.shape[1], dtype=torch.float64)
    target = design.T @ y.flatten() / sigma**2 + delta * prior_mean
    nn.utils.vector_to_parameters(torch.linalg.solve(precision, target), model.parameters())
    return model, x, y, design, precision


@pytest.mark.parametrize(
    "subset, structure, bias",
    [("all", "full", True), ("last_layer", "full", True), ("all", "kron", False), ("last_layer", "kron", False)],
)
def test_linear_regression_is_exact(subset, structure, bias):
    """Bishop, Pattern Recognition and Machine Learning, 3.3: posterior, predictive and evidence have closed forms.

    Kron is exact too where there is no bias: the curvature is the Kronecker product of I and the inputs' Gram matrix.
    """
    sigma, delta = 0.7, 1.9
    size = 8 if bias else 6
    prior_mean = torch.linspace(-1, 1, size, dtype=torch.float64)
    model, x, y, design, precision = linear_regression(bias, sigma, delta, prior_mean)
    la = Laplace(
        model, "regression", subset, structure, sigma_noise=sigma, prior_precision=delta, prior_mean=prior_mean
    )
    la.fit(loader(x, y, 7))
    covariance = torch.linalg.inv(precision)
    ours = la.posterior_precision.to_matrix() if structure == "kron" else la.posterior_precision
    close(ours, precision)
    if structure == "full":
        close(la.posterior_covariance, covariance)
    noise = sigma**2 * torch.eye(40, dtype=torch.float64)
    marginal = MultivariateNormal(design @ prior_mean, design @ design.T / delta + noise)
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(marginal.log_prob(y.flatten())), rel=1e-10)
    new = torch.randn(4, 3, dtype=torch.float64)
    mean, variance = la(new)
    js = naive.jacobians(model, new)
    close(mean, (js @ la.mean).reshape(4, 2))
    close(variance, js @ covariance @ js.transpose(1, 2))


class Slope(nn.Module):
    """Logistic regression with one parameter: logits (0, w x)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)

    def forward(self, x):
        z = self.linear(x)
        return torch.cat([torch.zeros_like(z), z], -1)


def slope_at_the_mode(n, delta):
    """Data of a noisy threshold, the negative log joint density as a function of w, and the model at its minimum."""
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    y = (torch.rand(n) < torch.sigmoid(1.2 * x[:, 0])).long()
    signs = (2 * y - 1).double()

    def negative_log_joint(w):
        likelihood = torch.nn.functional.softplus(-signs * x[:, 0] * w[..., None]).sum(-1)
        return likelihood + 0.5 * delta * w**2 - 0.5 * math.log(delta / (2 * math.pi))

    def derivatives(w, order):
        w = w.clone().requires_grad_(True)
        value, found = negative_log_joint(w), []
        for _ in range(order):
            (value,) = torch.autograd.grad(value, w, create_graph=True)
            found.append(value)
        return [v.detach() for v in found]

    w = torch.zeros((), dtype=torch.float64)
    for _ in range(30):
        first, second = derivatives(w, 2)
        w = w - first / second
    model = Slope().double()
    with torch.no_grad():
        model.linear.weight.fill_(w)
    return model, x, y, negative_log_joint, derivatives(w, 4)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_logistic_regression_against_numerical_integration(structure):
    """With h the negative log joint, log Z = Laplace - h4 / (8 h2^2) + 5 h3^2 / (24 h2^3) + O(n^-2) (Tierney, Kadane
    1986). So the evidence has to be off by this term, known here, up to terms smaller by another factor of order 1/n.
    """
    errors = []
    for n in (40, 160):
        model, x, y, negative_log_joint, (h1, h2, h3, h4) = slope_at_the_mode(n, delta=0.5)
        assert abs(float(h1)) < 1e-10
        la = Laplace(model, "classification", "all", structure, prior_precision=0.5)
        la.fit(loader(x, y, 16))
        assert float(la.posterior_precision) == pytest.approx(float(h2), rel=1e-10)
        grid = la.mean + torch.linspace(-15, 15, 20001, dtype=torch.float64) / h2.sqrt()
        log_z = torch.logsumexp(-negative_log_joint(grid), 0) + math.log(float(grid[1] - grid[0]))
        at_mode = -negative_log_joint(la.mean[0]) + 0.5 * (math.log(2 * math.pi) - h2.log())
        assert float(la.log_marginal_likelihood()) == pytest.approx(float(at_mode), rel=1e-10)
        correction = float(-h4 / (8 * h2**2) + 5 * h3**2 / (24 * h2**3))
        error = float(log_z - la.log_marginal_likelihood())
        assert error == pytest.approx(correction, rel=0.25)
        errors.append(abs(error))
    assert errors[1] < errors[0] / 2


def test_logistic_regression_predictive_is_the_integral_of_its_gaussian():
    """``mc`` and ``probit`` integrate sigmoid(z) against the Gaussian over z = w x; compare with quadrature.

    The probit approximation of the logistic integral is off by at most 0.02 (MacKay 1992 uses it for that reason).
    Here it is applied per logit, which for logits (0, z) leaves the variance of z and so MacKay's own formula.
    """
    model, x, y, _, _ = slope_at_the_mode(40, delta=0.5)
    la = Laplace(model, "classification", "all", "full", prior_precision=0.5)
    la.fit(loader(x, y))
    points = torch.tensor([[-3.0], [0.5], [2.0], [6.0]], dtype=torch.float64)
    sd = float(la.posterior_precision) ** -0.5
    w = la.mean + torch.linspace(-10, 10, 4001, dtype=torch.float64) * sd
    weights = torch.exp(-0.5 * ((w - la.mean) / sd) ** 2)
    truth = (torch.sigmoid(points * w) * weights).sum(1) / weights.sum()
    mc = la(points, link_approx="mc", n_samples=40000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mc[:, 1], truth, atol=4 * 0.5 / 200)
    assert torch.allclose(la(points)[:, 1], truth, atol=0.02)


# --- dense algebra, six classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure, prior", COMBINATIONS)
@pytest.mark.parametrize("case", ["mlp", "regression"])
def test_posterior_equals_dense_algebra(case, subset, structure, prior):
    noise = {"sigma_noise": 0.6} if case == "regression" else {}
    la = fitted(subset, structure, case, temperature=0.8, **noise)
    la.prior_precision = prior_of(la, prior)
    la.prior_mean = torch.linspace(-1, 1, la.n_params, dtype=torch.float64)
    truth = dense_precision(la)
    covariance = torch.linalg.inv(truth)
    if structure == "kron":
        close(la.posterior_precision.to_matrix(), truth)
    elif structure == "full":
        close(la.posterior_precision, truth)
        close(la.posterior_scale @ la.posterior_scale.T, covariance)
        assert torch.equal(la.posterior_scale, la.posterior_scale.tril())
        close(la.posterior_covariance, covariance)
    else:
        close(la.posterior_precision, truth.diagonal())
        close(la.posterior_scale, covariance.diagonal().sqrt())
        close(la.posterior_variance, covariance.diagonal())
    prior_precision = truth - dense_curvature(la) / float(la.sigma_noise) ** 2 / 0.8
    close(la.prior_precision_diag, prior_precision.diagonal())
    close(la.log_det_posterior_precision, torch.logdet(truth))
    close(la.log_det_prior_precision, torch.logdet(prior_precision))
    close(la.log_det_ratio, torch.logdet(truth) - torch.logdet(prior_precision))
    delta = la.mean - la.prior_mean
    close(la.scatter, delta @ prior_precision @ delta)
    values = la.mean + torch.randn(3, la.n_params, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(la.square_norm(values), torch.stack([(v - la.mean) @ truth @ (v - la.mean) for v in values]))
    normal = MultivariateNormal(la.mean, precision_matrix=truth)
    close(la.log_prob(values), normal.log_prob(values))
    close(la.log_prob(values[0]), normal.log_prob(values[0]))
    close(la.log_prob(values, normalized=False), -la.square_norm(values) / 2)
    js = torch.randn(4, 3, la.n_params, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    close(la.functional_variance(js), naive.glm_covariance(js, truth))
    flat = js.flatten(0, 1)
    close(la.functional_covariance(flat), flat @ covariance @ flat.T)


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("case", ["mlp", "regression", "sequence-output", "sequence-regression", "scalar"])
def test_log_likelihood_and_evidence_are_their_definitions(case, subset, structure):
    regression = CASES[case].likelihood == "regression"
    la = fitted(subset, structure, case, temperature=0.8, **({"sigma_noise": 0.6} if regression else {}))
    model, x, y = CASES[case].make()
    if regression:
        log_density = torch.distributions.Normal(model(x), 0.6).log_prob(y).sum().detach()
        constant = y.numel() * math.log(0.6 * math.sqrt(2 * math.pi))
        log_likelihood = (log_density + constant) / 0.8 - constant
    else:
        log_likelihood = -naive.loss(model, x, y, "classification") / 0.8
    assert float(la.log_likelihood) == pytest.approx(float(log_likelihood), rel=1e-12)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(la.mean).sum()
    volume = 0.5 * (la.n_params * math.log(2 * math.pi) - torch.logdet(dense_precision(la)))
    evidence = la.log_marginal_likelihood()
    assert evidence.shape == ()
    assert float(evidence) == pytest.approx(float(log_likelihood + prior + volume), rel=1e-10)


def test_sequences_of_a_regression_have_one_length():
    """The evidence counts the values of an example."""
    model, x, y = CASES["sequence-regression"].make()
    la = Laplace(model, "regression", "all", "diag")
    with pytest.raises(ValueError, match=r"\(2, 1, 3\) have 3 values per example, those of the first batch had 6"):
        la.fit([(x, y), (x[:2, :1], y[:2, :1])])


def test_a_refused_noise_changes_nothing():
    la = fitted("all", "kron", "regression")
    with pytest.raises(ValueError, match="sigma_noise must be positive"):
        la.log_marginal_likelihood(torch.tensor([7.0]), torch.tensor(-1.0))
    assert la.prior_precision.tolist() == [1.0]


@pytest.mark.parametrize("subset, structure", SIX)
def test_samples_have_the_posterior_s_moments(subset, structure):
    """n draws estimate a mean to sd/sqrt(n) and C_ij to sqrt((C_ii C_jj + C_ij^2) / n): below 5 such units each."""
    la = fitted(subset, structure)
    n, covariance = 20000, torch.linalg.inv(dense_precision(la))
    draws = la.sample(n, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (n, la.n_params)
    variance = covariance.diagonal()
    assert float(((draws.mean(0) - la.mean).abs() / (variance / n).sqrt()).max()) < 5
    unit = ((torch.outer(variance, variance) + covariance**2) / n).sqrt()
    assert float(((torch.cov(draws.T) - covariance).abs() / unit).max()) < 5
    again = la.sample(n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert not torch.equal(draws[:10], la.sample(10, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(3)
    one = la.sample(2)
    torch.manual_seed(3)
    assert torch.equal(one, la.sample(2))


# --- evidence as a function of the hyperparameters -------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure, prior", COMBINATIONS)
def test_evidence_is_differentiable(subset, structure, prior):
    la = fitted(subset, structure, "regression")
    start = prior_of(la, prior).requires_grad_(True)
    sigma = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (start, sigma))
    value = la.log_marginal_likelihood(start, sigma)
    assert value.shape == ()
    assert torch.equal(la.prior_precision, start)
    value.backward()
    assert float(start.grad.norm()) > 0
    assert float(sigma.grad.norm()) > 0


def test_evidence_with_damping_is_differentiable():
    la = fitted("all", "kron", damping=True)
    assert la.posterior_precision.damping
    start = prior_of(la, "layerwise").requires_grad_(True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (start,))


@pytest.mark.parametrize("subset, structure", SIX)
def test_changing_a_hyperparameter_changes_everything_that_depends_on_it(subset, structure):
    """Whatever is cached must not outlive a change of prior, noise or temperature."""
    la = fitted(subset, structure, "regression")
    x = CASES["regression"].make()[1]
    js = la.backend.jacobians(x)[0]
    for change in (
        {"prior_precision": 3.0},
        {"sigma_noise": 0.3},
        {"temperature": 2.0},
        {"prior_precision": prior_of(la, "layerwise")},
    ):
        before = la(x)[1]
        for name, value in change.items():
            setattr(la, name, value)
        truth = dense_precision(la)
        assert naive.relative_error(la(x)[1], before) > 1e-2
        close(la(x)[1], naive.glm_covariance(js, truth))
        close(la.functional_variance(js), naive.glm_covariance(js, truth))
        close(la.log_det_posterior_precision, torch.logdet(truth))
        noise = torch.randn(2, la.n_params, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        draws = la.sample(2, generator=torch.Generator().manual_seed(0)) - la.mean
        close((draws @ truth * draws).sum(1), noise.square().sum(1))


def test_temperature_scales_the_curvature_and_prior_mean_the_scatter():
    la = fitted()
    precision = la.posterior_precision
    la.temperature = 4.0
    close(la.posterior_precision - torch.eye(la.n_params).double(), (precision - torch.eye(la.n_params).double()) / 4)
    la.prior_mean = la.mean.clone()
    assert float(la.scatter) == 0
    la.prior_mean = 0.5
    close(la.scatter, (la.mean - 0.5).square().sum())
