"""Posteriors: closed forms, dense algebra, evidence, samples, state, and the user's model left as it was found."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from laplace import FullLaplace, Laplace
from laplace.tuning import score_grid

from . import naive
from .models import CASES, loader, mlp

STRUCTURES = ("full", "kron", "diag")
SIX = [(subset, structure) for subset in ("all", "last_layer") for structure in STRUCTURES]
PRIORS = {
    "full": ("scalar", "layerwise", "diag"),
    "kron": ("scalar", "layerwise"),
    "diag": ("scalar", "layerwise", "diag"),
}
COMBINATIONS = [(subset, structure, prior) for subset, structure in SIX for prior in PRIORS[structure]]


def fitted(subset="all", structure="full", case="mlp", n=5, **kwargs):
    model, x, y = CASES[case].make(n=n)
    la = Laplace(model, CASES[case].likelihood, subset, structure, **kwargs)
    la.fit(loader(x, y))
    return la


def prior_of(la, structure, seed=0):
    """A random positive prior precision."""
    size = {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}[structure]
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def dense_curvature(la):
    if la.structure == "kron":
        return naive.kron_matrix(la.H_facs.kfacs)
    return la.H if la.structure == "full" else torch.diag(la.H)


def dense_precision(la):
    """Posterior precision from the definition."""
    prior = la.prior_precision
    if len(prior) == la.n_layers and la.n_layers not in (1, la.n_params):
        prior = torch.cat([d.expand(p.numel()) for d, p in zip(prior, la.params, strict=True)])
    prior = torch.diag(prior.expand(la.n_params))
    return dense_curvature(la) / float(la.sigma_noise) ** 2 / la.temperature + prior


def close(value, truth, tolerance=1e-10):
    assert naive.relative_error(value.detach(), truth.detach()) < tolerance


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


# --- fitting in parts, state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure", SIX)
def test_fit_without_override_adds(subset, structure):
    model, x, y = CASES["mlp"].make(n=7)
    whole = Laplace(model, "classification", subset, structure)
    whole.fit(loader(x, y))
    parts = Laplace(model, "classification", subset, structure)
    parts.fit(loader(x[:4], y[:4]), override=False)
    parts.fit(loader(x[4:], y[4:]), override=False)
    assert parts.n_data == whole.n_data == 7
    close(dense_curvature(parts), dense_curvature(whole), 1e-12)
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-14)
    parts.fit(loader(x, y))
    assert parts.n_data == 7
    assert torch.equal(dense_curvature(parts), dense_curvature(whole))


class OnlyBatches:
    """Batches, without a length and without a data set that has one."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("subset, structure", SIX)
def test_examples_are_counted_not_asked_for(subset, structure, backend):
    from laplace.curvature import backend_class

    model, x, y = CASES["mlp"].make(n=7)
    found = []
    for data in (OnlyBatches((x[:4], y[:4]), (x[4:], y[4:])), loader(x, y, batch_size=4)):
        la = Laplace(model, "classification", subset, structure, backend=backend_class(backend, "ggn")[0])
        la.fit(data)
        assert la.n_data == 7
        found.append(dense_curvature(la))
    assert torch.equal(*found)


@pytest.mark.parametrize("subset, structure", SIX)
def test_a_second_fit_forgets_the_first(subset, structure):
    """Whatever is cached from the first fit must not survive the second, nor an addition to it."""
    model, x, y = CASES["mlp"].make(n=7)
    la = Laplace(model, "classification", subset, structure)
    for first, override, data in (
        ((x[:3], y[:3]), True, (x[3:], y[3:])),
        ((x[:3], y[:3]), False, (x, y)),
    ):
        la.fit(loader(*first))
        used = la.log_marginal_likelihood(), la(x), la.sample(1), score_grid(la, loader(x, y), torch.ones(2))
        assert used[1].shape == (7, 3)
        la.fit(loader(x[3:], y[3:]), override=override)
        fresh = Laplace(model, "classification", subset, structure)
        fresh.fit(loader(*data))
        close(la.log_marginal_likelihood(), fresh.log_marginal_likelihood())
        close(la(x), fresh(x))
        close(score_grid(la, loader(x, y), torch.ones(2))[0], score_grid(fresh, loader(x, y), torch.ones(2))[0])
        draws = [posterior.sample(2, torch.Generator().manual_seed(0)) for posterior in (la, fresh)]
        truth = dense_precision(fresh)
        close(*[((d - fresh.mean) @ truth * (d - fresh.mean)).sum(1) for d in draws])


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("case", ["mlp", "regression"])
def test_state_dict_round_trip(case, subset, structure):
    noise = {"sigma_noise": 0.6} if case == "regression" else {}
    la = fitted(subset, structure, case, temperature=0.8, **noise)
    la.prior_precision = prior_of(la, "layerwise")
    la.prior_mean = 0.25
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    model, x, y = CASES[case].make()
    again = Laplace(model, CASES[case].likelihood, subset, structure)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert (again.n_data, again.n_outputs, again.temperature) == (la.n_data, la.n_outputs, la.temperature)
    for one, two in zip(again(x), la(x), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(again.sample(3, generators[0]), la.sample(3, generators[1]))
    again.fit(loader(x, y), override=False)
    assert again.n_data == 2 * la.n_data


@pytest.mark.parametrize("structure", ["full", "kron", "ekfac", "diag", "lowrank", "blockdiag", "gp"])
@pytest.mark.parametrize("ours, theirs", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_state_goes_on_in_a_model_of_another_precision(structure, ours, theirs):
    model, x, y = CASES["mlp"].make()
    model.float()  # weights that both types hold
    one, two = copy.deepcopy(model).to(ours), copy.deepcopy(model).to(theirs)
    la, again = Laplace(one, "classification", "all", structure), Laplace(two, "classification", "all", structure)
    la.fit(loader(x.to(ours), y))
    again.load_state_dict(la.state_dict())
    assert again(x.to(theirs)).dtype == theirs
    close(again(x.to(theirs)), la(x.to(ours)), 2e-6)
    if structure != "gp":
        assert again.sample(2).dtype == theirs
    if structure not in ("gp", "lowrank"):
        again.fit(loader(x.to(theirs), y), override=False)
        both = Laplace(two, "classification", "all", structure)
        both.fit(loader(torch.cat([x, x]).to(theirs), torch.cat([y, y])))
        close(again(x.to(theirs)), both(x.to(theirs)), 2e-6)


@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("subset, structure", SIX)
def test_whole_object_survives_torch_save(subset, structure, backend):
    from laplace.curvature import backend_class

    la = fitted(subset, structure, backend=backend_class(backend, "ggn")[0])
    la.optimize_prior_precision(n_steps=3)
    x = CASES["mlp"].make()[1]
    expected = la(x)
    buffer = io.BytesIO()
    torch.save(la, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), expected)
    assert type(again) is type(la)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    la, x = fitted(), CASES["mlp"].make()[1]
    before, state = la(x), fitted(structure="kron").state_dict()
    with pytest.raises(ValueError, match="cls_name is 'KronLaplace', but this is 'FullLaplace'"):
        la.load_state_dict(state)
    with pytest.raises(ValueError, match="schema version 99"):
        la.load_state_dict({**la.state_dict(), "schema_version": 99})
    with pytest.raises(ValueError, match="likelihood is 'regression'"):
        la.load_state_dict({**la.state_dict(), "likelihood": "regression"})
    with pytest.raises(ValueError, match="fitted at other parameters"):
        la.load_state_dict({**la.state_dict(), "mean": la.mean + 1})
    state = la.state_dict()
    with pytest.raises(ValueError, match="does not fit|do not fit"):
        la.load_state_dict({**state, "sums": {"loss": state["sums"]["loss"]}})
    with pytest.raises(ValueError, match="NaN or Inf"):
        la.load_state_dict({**state, "sums": {**state["sums"], "full": state["sums"]["full"] * float("nan")}})
    assert torch.equal(la(x), before)


# --- the user's model ------------------------------------------------------------------------------------------------


class Modes(nn.Module):
    """Batch norm and dropout, with training flags that differ between modules."""

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.drop, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.bn(self.first(x)))))


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("subset, structure", SIX)
def test_the_model_is_left_as_it_was_found(subset, structure, backend):
    from laplace.curvature import backend_class

    torch.manual_seed(0)
    model = Modes().double()
    if backend == "curvlinops":
        model.bn.requires_grad_(False)  # it has no Kronecker factors for normalisation
    model.train()
    model.bn.eval()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    flags = [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    la = Laplace(model, "classification", subset, structure, backend=backend_class(backend, "ggn")[0])
    la.fit(loader(x, y))
    la(x)
    la(x, link_approx="mc", n_samples=3)
    la(x, pred_type="nn", link_approx="mc", n_samples=3)
    la.predictive_samples(x, n_samples=2)
    la.log_marginal_likelihood()
    la.optimize_prior_precision(n_steps=2)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader(x, y), grid_size=3, pred_type="nn", link_approx="mc", n_samples=2
    )
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ] == hooks


@pytest.mark.parametrize("subset, structure", SIX)
def test_training_flags_do_not_change_the_fit(subset, structure):
    torch.manual_seed(0)
    model = Modes().double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    results = []
    for mode in (True, False):
        model.train(mode)
        la = Laplace(model, "classification", subset, structure)
        la.fit(loader(x, y))
        results.append(
            (
                dense_curvature(la),
                la(x),
                la(x, pred_type="nn", link_approx="mc", generator=torch.Generator().manual_seed(0)),
            )
        )
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_failed_fit_leaves_the_earlier_one():
    """The failing batch must not leave its mark either: here it would decide differently which layers are covered."""
    model, x, y = CASES["used-outside"].make()
    la = Laplace(model, "classification", "all", "kron")
    la.fit(loader(x, y))
    before, rows = la(x), list(la.coverage)
    for bad_x, bad_y in ((x * float("nan"), y), (x * 0, y + 7)):
        with pytest.raises(ValueError):
            la.fit(loader(bad_x, bad_y))
        assert list(la.coverage) == rows
        assert la.n_data == 5
        assert torch.equal(la(x), before)
    with pytest.raises(ValueError, match="empty"):
        la.fit([])
    assert torch.equal(la(x), before)


def test_a_posterior_that_is_not_positive_definite_says_what_to_do():
    from laplace.linalg.dense import invsqrt_precision

    with pytest.raises(ValueError, match="not positive definite.*raise the prior precision"):
        invsqrt_precision(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert isinstance(fitted(), FullLaplace)
    assert (
        naive.relative_error(
            invsqrt_precision(torch.diag(torch.tensor([4.0, 9.0]))), torch.diag(torch.tensor([0.5, 1 / 3]))
        )
        < 1e-6
    )


def test_mean_is_the_parameter_vector():
    la = fitted()
    assert torch.equal(la.mean, nn.utils.parameters_to_vector(mlp_parameters(la)).detach())


def mlp_parameters(la):
    return list(la.model.parameters())


def test_single_precision_posterior_works():
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(8, 3), torch.randint(3, (8,))
    for subset, structure in SIX:
        la = Laplace(model, "classification", subset, structure)
        la.fit(loader(x, y))
        assert la(x).dtype == torch.float32
        assert torch.allclose(la(x).sum(-1), torch.ones(8), atol=1e-5)
        assert la.log_marginal_likelihood().isfinite()
