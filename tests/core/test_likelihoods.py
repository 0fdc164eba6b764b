"""Likelihoods beyond the two: against naive references, torch's losses and integrals on a fine grid."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, Likelihood, LinkApprox, marglik_training
from laplace.curvature import NativeEF, NativeGGN, NativeHessian
from laplace.likelihoods import (
    BaseLikelihood,
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
    WeightedCategorical,
    likelihood_of,
)
from laplace.predictive import glm_distribution

from . import naive, naive_likelihoods

N, OUTPUTS = 9, 4
SETTINGS = {
    "weights": {"class_weights": [0.5, 2.0, 0.0, 1.5]},
    "smoothing": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": -100},
    "soft": {"soft_targets": True},
    "all": {"class_weights": [0.5, 2.0, 0.3, 1.5], "label_smoothing": 0.1, "ignore_index": 2},
    "soft-all": {"class_weights": [0.5, 2.0, 0.3, 1.5], "label_smoothing": 0.1, "soft_targets": True},
}
LAWS = {
    "bernoulli": (Bernoulli(), naive_likelihoods.Bernoulli()),
    "poisson": (Poisson(), naive_likelihoods.Poisson()),
    "heteroscedastic": (HeteroscedasticGaussian(), naive_likelihoods.Heteroscedastic()),
    **{k: (WeightedCategorical(**s), naive_likelihoods.Weighted(**s)) for k, s in SETTINGS.items()},
}
TORCH = {
    "bernoulli": lambda f, y: nn.BCEWithLogitsLoss(reduction="sum")(f, y),
    "poisson": lambda f, y: nn.PoissonNLLLoss(reduction="sum")(f, y) + torch.lgamma(y + 1).sum(),
    "heteroscedastic": lambda f, y: nn.GaussianNLLLoss(full=True, reduction="sum", eps=1e-12)(
        f[:, :2], y, f[:, 2:].exp()
    ),
    **{
        k: lambda f, y, s=s: nn.CrossEntropyLoss(
            weight=torch.tensor(s["class_weights"], dtype=torch.float64) if "class_weights" in s else None,
            label_smoothing=s.get("label_smoothing", 0.0),
            ignore_index=s.get("ignore_index", -1),
            reduction="sum",
        )(f, y)
        for k, s in SETTINGS.items()
    },
}
every = pytest.mark.parametrize("name", LAWS)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)).double()


def targets(name):
    generator = torch.Generator().manual_seed(3)
    if "soft" in name:
        return torch.rand(N, OUTPUTS, generator=generator, dtype=torch.float64).softmax(-1)
    if name == "bernoulli":
        return torch.randint(2, (N, OUTPUTS), generator=generator).double()
    if name == "poisson":
        return torch.randint(5, (N, OUTPUTS), generator=generator).double()
    if name == "heteroscedastic":
        return torch.randn(N, OUTPUTS // 2, generator=generator, dtype=torch.float64)
    y = torch.randint(OUTPUTS, (N,), generator=generator)
    y[::3] = SETTINGS[name].get("ignore_index", 1)
    return y


def data(name):
    return torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), targets(name)


def loader(name):
    return DataLoader(TensorDataset(*data(name)), batch_size=4)


def fitted(name, subset="all", structure="full", **kwargs):
    la = Laplace(model(), LAWS[name][0], subset, structure, prior_precision=0.7, **kwargs)
    la.fit(loader(name))
    return la


@every
def test_loss_is_torchs(name):
    x, y = data(name)
    law, f = LAWS[name][0], model()(x).detach()
    assert float(law.loss(f, y)) == pytest.approx(float(TORCH[name](f, y)), rel=1e-10)
    assert float(naive.loss(model(), x, y, LAWS[name][1])) == pytest.approx(float(TORCH[name](f, y)), rel=1e-10)


@every
@pytest.mark.parametrize("backend, estimator", [(NativeGGN, "ggn"), (NativeEF, "ef")])
def test_sums_against_the_naive_reference(name, backend, estimator):
    x, y = data(name)
    dense = naive.full(model(), x, y, LAWS[name][1], estimator)
    assert naive.relative_error(fitted(name, backend=backend).H, dense) < 1e-9
    assert naive.relative_error(fitted(name, structure="diag", backend=backend).H, dense.diagonal()) < 1e-9
    kron = naive.kron_matrix(naive.kron(model(), x, y, LAWS[name][1], estimator))
    assert naive.relative_error(fitted(name, structure="kron", backend=backend).H_facs.to_matrix(), kron) < 1e-9
    last = fitted(name, "last_layer", "full", backend=backend)
    assert naive.relative_error(last.H, dense[-last.n_params :, -last.n_params :]) < 1e-9


@every
def test_sampled_fisher_has_the_ggn_for_its_mean(name):
    """Of 3000 draws of every example's targets: thirty for each of a hundred copies, since noise belongs to the copy."""
    x, y = data(name)
    copies = TensorDataset(x.repeat(100, 1), y.repeat(100, *[1] * (y.ndim - 1)))
    la = Laplace(
        model(), LAWS[name][0], "all", "full", backend_kwargs={"stochastic": True, "num_samples": 30, "seed": 0}
    )
    la.fit(DataLoader(copies, batch_size=len(copies)))
    assert naive.relative_error(la.H / 100, fitted(name).H) < 0.1


@every
def test_evidence_against_dense_determinants(name):
    x, y = data(name)
    la, parameters = fitted(name), nn.utils.parameters_to_vector(model().parameters()).detach()
    precision = naive.full(model(), x, y, LAWS[name][1], "ggn") + 0.7 * torch.eye(len(parameters), dtype=torch.float64)
    ratio = torch.logdet(precision) - len(parameters) * math.log(0.7)
    truth = -naive.loss(model(), x, y, LAWS[name][1]) - 0.5 * (ratio + 0.7 * parameters @ parameters)
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(truth), rel=1e-9)


@every
def test_kernel_and_low_rank_posteriors(name):
    x, _ = data(name)
    truth = naive.glm_covariance(naive.jacobians(model(), x), fitted(name).posterior_precision)
    gp = fitted(name, structure="gp", n_subset=N)
    low = fitted(name, structure="lowrank", backend=NativeGGN, backend_kwargs={"low_rank": 60})
    for la in (gp, low):
        _, variance = glm_distribution(la, x)
        assert naive.relative_error(variance, truth) < 1e-5


@every
def test_tuning_state_and_samples(name):
    x, _ = data(name)
    la = fitted(name, structure="kron")
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(name), grid_size=5)
    la.optimize_prior_precision(
        pred_type="nn", link_approx="mc", method="gridsearch", val_loader=loader(name), grid_size=3
    )
    la.optimize_prior_precision(n_steps=3)
    again = Laplace(model(), LAWS[name][0], "all", "kron")
    again.load_state_dict(la.state_dict())
    for one, two in zip(as_tuple(la(x)), as_tuple(again(x)), strict=True):
        assert torch.equal(one, two) and bool(torch.isfinite(one).all())
    assert la.predictive_samples(x, n_samples=3).shape[:2] == (3, N)
    with pytest.raises(ValueError, match="likelihood is .* but this is 'classification'"):
        Laplace(model(), "classification", "all", "kron").load_state_dict(la.state_dict())
    assert copy.deepcopy(la).likelihood_object.identity == la.likelihood_object.identity


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@every
def test_training_by_the_evidence(name):
    la, net, margliks, losses = marglik_training(
        model(), loader(name), LAWS[name][0], "kron", n_epochs=3, n_epochs_burnin=1, optimizer_kwargs={"lr": 1e-3}
    )
    assert len(losses) == 3 and all(math.isfinite(v) for v in margliks + losses)


@every
def test_hessian_backend_differentiates_the_loss(name):
    x, y = data(name)
    backend = NativeHessian(model(), LAWS[name][0])
    loss, hessian = backend.full(x, y)
    net = model()
    names = [n for n, _ in net.named_parameters()]
    start = nn.utils.parameters_to_vector(net.parameters()).detach()

    def of(vector):
        parts = vector.split([p.numel() for p in net.parameters()])
        weights = {n: part.view_as(p) for n, part, p in zip(names, parts, net.parameters(), strict=True)}
        return TORCH[name](torch.func.functional_call(net, weights, (x,)), y)

    assert naive.relative_error(hessian, torch.autograd.functional.hessian(of, start)) < 1e-9
    assert float(loss) == pytest.approx(float(of(start)))


# --- predictives -------------------------------------------------------------------------------------------------


def grid(mean, variance, size=4001):
    """Nodes and normalised weights of a Gaussian on a fine grid, ``(nodes, …)``."""
    z = torch.linspace(-9, 9, size, dtype=torch.float64).reshape(-1, *[1] * mean.ndim)
    weights = torch.exp(-z.square() / 2)
    return mean + variance.sqrt() * z, weights / weights.sum()


def glm(name):
    x, y = data(name)
    la = fitted(name)
    f, variance = glm_distribution(la, x, diagonal=True)
    return la, x, y, f, variance


def test_poisson_predictive():
    la, x, y, f, variance = glm("poisson")
    nodes, weights = grid(f, variance)
    rate = nodes.exp()
    mean = (weights * rate).sum(0)
    spread = (weights * (rate - mean).square()).sum(0)
    ours = la(x)
    assert naive.relative_error(ours[0], mean) < 1e-8
    assert naive.relative_error(ours[1], mean + spread) < 1e-6
    likelihood = (weights * torch.exp(y * nodes - rate - torch.lgamma(y + 1))).sum(0)
    scores = la.likelihood_object.scores(la.likelihood_object.integrate(f, variance, LinkApprox.PROBIT), y)
    assert naive.relative_error(scores["nll"], -likelihood.log().flatten()) < 1e-5
    sampled = la(x, link_approx="mc", n_samples=20000, generator=torch.Generator().manual_seed(0))
    assert naive.relative_error(sampled[0], mean) < 0.05


@pytest.mark.parametrize(
    "rate, variance, count", [(1e4, 1.0, 3e4), (1e4, 4.0, 0), (1e-3, 9.0, 50), (5.0, 1e-8, 2), (2.0, 0.0, 3)]
)
def test_probability_of_large_and_unlikely_counts(rate, variance, count):
    """Where the Poisson is a hundred times narrower than the Gaussian over its log rate, and far from its middle."""
    f, v, y = (torch.tensor([[value]], dtype=torch.float64) for value in (math.log(rate), variance, count))
    nodes, weights = grid(f, v, size=400001)
    terms = weights.clamp(min=1e-300).log() + y * nodes - nodes.exp() - torch.lgamma(y + 1)
    scores = Poisson().scores(Poisson().integrate(f, v, LinkApprox.PROBIT), y)
    assert float(scores["nll"]) == pytest.approx(-float(terms.logsumexp(0)), rel=1e-5)


def test_bernoulli_predictive():
    la, x, y, f, variance = glm("bernoulli")
    nodes, weights = grid(f, variance)
    truth = (weights * nodes.sigmoid()).sum(0)
    assert naive.relative_error(la(x), truth) < 0.01
    assert naive.relative_error(la(x), (f / (1 + math.pi / 8 * variance).sqrt()).sigmoid()) < 1e-12
    sampled = la(x, link_approx="mc", n_samples=20000, generator=torch.Generator().manual_seed(0))
    assert naive.relative_error(sampled, truth) < 0.01


def test_heteroscedastic_predictive():
    la, x, y, f, variance = glm("heteroscedastic")
    nodes, weights = grid(f, variance)
    noise = (weights * nodes.exp()).sum(0)[:, 2:]
    mean, spread = la(x)
    assert torch.allclose(mean, f[:, :2])
    assert naive.relative_error(spread, variance[:, :2] + noise) < 1e-8
    scores = la.likelihood_object.scores((mean, spread), y)
    truth = -torch.distributions.Normal(mean, spread.sqrt()).log_prob(y).mean(1)
    assert naive.relative_error(scores["nll"], truth) < 1e-10


def test_one_logit_takes_targets_without_an_output_dimension():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 1)).double()
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    flat, column = (Laplace(net, Bernoulli(), "all", "full") for _ in range(2))
    flat.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    column.fit(DataLoader(TensorDataset(x, y[:, None].double()), batch_size=3))
    assert torch.equal(flat.H, column.H) and float(flat.loss) == float(column.loss)
    logits = torch.cat([torch.zeros(8, 1).double(), net(x).detach()], 1)
    two = Categorical()
    assert float(flat.loss) == pytest.approx(float(two.loss(logits, y)))
    classifier = [v for v in two.hessian_root(logits, y)]
    p = net(x).detach().sigmoid()
    assert torch.allclose(sum(v[:, 1:] ** 2 for v in classifier), p * (1 - p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_and_wrong_predictions_have_their_loss(dtype):
    """Probabilities of e⁻⁸⁰⁰ are zero, their logarithms are not."""
    logits, none = torch.tensor([[0.0, 800.0]], dtype=dtype), torch.zeros(1, 2, 2, dtype=dtype)
    label = torch.tensor([0])
    for law, y in ((Categorical(), label), (WeightedCategorical(), label), (Bernoulli(), torch.tensor([[1, 0]]))):
        for link in (LinkApprox.PROBIT, LinkApprox.MC):
            scores = law.scores(law.integrate(logits, none, link), y)
            assert float(scores["nll"].max()) == pytest.approx(800)
        assert law.tuning_loss(law.at(logits), y) == pytest.approx(800, abs=1)


def test_ignored_labels_have_no_curvature_loss_or_score():
    x, y = data("ignored")
    kept, law = y != -100, LAWS["ignored"][0]
    some, less = Laplace(model(), law, "all", "full"), Laplace(model(), "classification", "all", "full")
    some.fit([(x, y)])
    less.fit([(x[kept], y[kept])])
    assert naive.relative_error(some.H, less.H) < 1e-12 and float(some.loss) == pytest.approx(float(less.loss))
    f = model()(x).detach()
    assert len(law.scores(law.at(f), y)["nll"]) == int(kept.sum())


def test_labels_of_sequences_are_ignored_one_by_one():
    torch.manual_seed(0)
    net, law = nn.Linear(3, OUTPUTS).double(), WeightedCategorical(ignore_index=-100)
    x, y = torch.randn(5, 6, 3).double(), torch.randint(OUTPUTS, (5, 6))
    y[:, 4:] = -100
    la, short = Laplace(net, law, "all", "full"), Laplace(net, "classification", "all", "full")
    la.fit([(x, y)])
    short.fit([(x[:, :4], y[:, :4])])
    assert naive.relative_error(la.H, short.H) < 1e-12
    assert la(x).shape == (5, 6, OUTPUTS)


def test_nothing_set_is_the_plain_likelihood():
    x, y = data("weights")
    plain, weighted = (Laplace(model(), law, "all", "kron") for law in ("classification", WeightedCategorical()))
    for la in (plain, weighted):
        la.fit([(x, y)])
    assert float(plain.loss) == pytest.approx(float(weighted.loss)) and torch.allclose(plain(x), weighted(x))
    assert weighted.likelihood is weighted.likelihood_object


# --- names, setters and refusals ---------------------------------------------------------------------------------


def test_a_word_is_parsed_wherever_it_is_set():
    la = Laplace(model(), "classification", "all", "full")
    assert la.likelihood is Likelihood.CLASSIFICATION and la.likelihood == "classification"
    la.likelihood = "regression"
    assert la.likelihood is Likelihood.REGRESSION and isinstance(la.likelihood_object, Gaussian)
    backend = la.backend
    la.likelihood = "classification"
    assert backend.likelihood is Likelihood.CLASSIFICATION and backend.factor == 1.0
    backend.likelihood = "regression"
    assert backend.likelihood is Likelihood.REGRESSION and backend.factor == 0.5
    assert isinstance(backend.lossfunc, nn.MSELoss)
    for owner in (la, la.backend):
        with pytest.raises(ValueError, match="likelihood='bogus' is unknown; valid values are 'regression'"):
            owner.likelihood = "bogus"
    with pytest.raises(ValueError, match="make an object of it"):
        likelihood_of(Poisson)
    assert isinstance(likelihood_of(Likelihood.REWARD_MODELING).fitted, Categorical)


def test_a_word_that_is_set_is_the_likelihood_of_the_fit():
    torch.manual_seed(0)
    x, y = torch.randn(N, 3).double(), torch.randn(N, OUTPUTS).double()
    late, early = Laplace(model(), "classification", "all", "full"), Laplace(model(), "regression", "all", "full")
    assert late.backend.likelihood == "classification"
    late.likelihood = "regression"
    for la in (late, early):
        la.fit([(x, y)])
    assert float(late.log_likelihood) == float(early.log_likelihood)
    assert torch.equal(late(x)[1], early(x)[1])


@pytest.mark.parametrize(
    "law, f, y, message",
    [
        (Bernoulli(), (3, 2), torch.tensor([[0, 1], [2, 0], [3, 1]]), "Target 2 of example 1 .* 2 example"),
        (Bernoulli(), (3, 2), torch.tensor([0, 1, 1]), "0 or 1 for every logit"),
        (Bernoulli(), (2, 1), torch.tensor([0.5, math.nan]), "NaN"),
        (Poisson(), (2, 1), torch.tensor([[1.0], [-1.0]]), "Target -1.0 of example 1 is no count"),
        (Poisson(), (2, 1), torch.tensor([[1.5], [1.0]]), "Target 1.5 of example 0"),
        (Poisson(), (2, 1), torch.tensor([1, 2]), "one count per output"),
        (HeteroscedasticGaussian(), (2, 3), torch.zeros(2, 1), "not pairs"),
        (HeteroscedasticGaussian(), (2, 4), torch.zeros(2, 4), r"expected \(2, 2\)"),
        (WeightedCategorical(class_weights=[1, 2]), (2, 3), torch.tensor([0, 1]), "2 class_weights for 3 outputs"),
        (WeightedCategorical(ignore_index=-100), (2, 3), torch.tensor([-100, -1]), "Label -1 of example 1"),
        (WeightedCategorical(soft_targets=True), (2, 3), torch.tensor([0, 1]), "soft_targets=True takes floats"),
        (WeightedCategorical(soft_targets=True), (1, 2), torch.tensor([[0.5, 0.6]]), "example 0 is no distribution"),
        (BaseLikelihood(), (2, 3), torch.tensor([0]), "1 targets for the outputs of 2 examples"),
    ],
)
def test_targets_that_do_not_fit_are_named(law, f, y, message):
    with pytest.raises(ValueError, match=message):
        law.check(torch.zeros(f), y)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"class_weights": [1.0, -1.0]}, "must be finite and not negative"),
        ({"soft_targets": True, "ignore_index": 3}, "leave one of them out"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightedCategorical(**settings)


def test_what_makes_no_sense_is_refused():
    la = fitted("poisson")
    x, _ = data("poisson")
    with pytest.raises(ValueError, match="sigma_noise=2.0 has no meaning for laplace.likelihoods.poisson:Poisson"):
        la.sigma_noise = 2.0
    with pytest.raises(ValueError, match="'bridge' is for class probabilities"):
        la(x, link_approx="bridge")
    with pytest.raises(ValueError, match="joint=True is for regression"):
        la(x, joint=True)


# --- other packages ----------------------------------------------------------------------------------------------


@every
def test_curvlinops_refuses_what_it_does_not_know(name):
    curvlinops = pytest.importorskip("laplace.curvature.curvlinops")
    for structure in ("kron", "full"):
        with pytest.raises(ValueError, match="curvlinops knows .* not .* Use the native backend"):
            fitted(name, structure=structure, backend=curvlinops.CurvlinopsGGN)


@every
def test_backpack_takes_any_likelihood_but_for_its_own_factors(name):
    backpack = pytest.importorskip("laplace.curvature.backpack")
    for backend, reference in ((backpack.BackPackGGN, NativeGGN), (backpack.BackPackEF, NativeEF)):
        ours = fitted(name, structure="diag", backend=backend).H
        assert naive.relative_error(ours, fitted(name, structure="diag", backend=reference).H) < 1e-9
    with pytest.raises(ValueError, match="BackPACK knows .* not .* Use the native backend"):
        fitted(name, structure="kron", backend=backpack.BackPackGGN)


@every
def test_asdl_takes_any_likelihood(name):
    asdl = pytest.importorskip("laplace.curvature.asdl")
    for backend, reference in ((asdl.AsdlGGN, NativeGGN), (asdl.AsdlEF, NativeEF)):
        ours = fitted(name, structure="kron", backend=backend).H_facs.to_matrix()
        assert naive.relative_error(ours, fitted(name, structure="kron", backend=reference).H_facs.to_matrix()) < 1e-9
