"""EKFAC against dense Jacobians projected on its eigenbasis, against curvlinops, and the laws that make it EKFAC."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laplace import EKFACLaplace, Laplace
from laplace.curvature import backend_class
from laplace.curvature.conformance import SumsConformance
from laplace.predictive import glm_distribution
from laplace.structures.ekfac import Eigenbasis
from laplace.structures.sums import CurvatureSums

from . import naive, test_drift, test_layers
from .models import CASES, conv, loader, mlp
from .test_drift import BOUND, SEED, UserGGN, directions, head, times, worst

TOLERANCE = 1e-10
KINDS = {**CASES, **test_layers.CASES}
REFUSING = [(b, e) for b in ("curvlinops", "asdl", "backpack") for e in ("ggn", "ef")]


def fit(model, likelihood, x, y, subset="all", backend=("native", "ggn"), structure="ekfac", **kwargs):
    cls, options = backend_class(*backend)
    la = Laplace(model, likelihood, subset, structure, backend=cls, backend_kwargs={**options, **kwargs})
    la.fit(loader(x, y))
    return la


def bases(la):
    """The dense orthonormal basis of every parameter."""
    found = []
    for vectors, (table,) in zip(la.H.eigenvectors, la.H.eigenvalues, strict=True):
        dense = [torch.eye(n) if q is None else q for q, n in zip(vectors, table.shape, strict=True)]
        dense = [q.double().contiguous() for q in dense]
        found.append(torch.kron(*dense) if len(dense) == 2 else dense[0])
    return found


def diagonal_in(la, full):
    """The diagonals of the parameters' blocks of a dense matrix in the posterior's basis, by parameter."""
    found, start = [], 0
    for q in bases(la):
        rows = slice(start, start + len(q))
        found.append((q.T @ full[rows, rows] @ q).diagonal())
        start += len(q)
    return found


def moments(la):
    return [table.flatten() for (table,) in la.H.eigenvalues]


# --- what is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator, approximation", [("ggn", "expand"), ("ef", "expand"), ("ggn", "reduce")])
@pytest.mark.parametrize("name", KINDS)
def test_second_moments_are_the_diagonal_of_the_curvature_in_the_basis(name, estimator, approximation):
    case = KINDS[name]
    model, x, y = case.make()
    la = fit(model, case.likelihood, x, y, backend=("native", estimator), kfac_approx=approximation)
    expected = diagonal_in(la, naive.full(model, x, y, case.likelihood, estimator))
    assert naive.relative_error(torch.cat(moments(la)), torch.cat(expected)) < TOLERANCE
    for ours, truth in zip(moments(la), expected, strict=True):
        assert float((ours - truth).norm()) <= 1e-8 * float(torch.cat(expected).norm())
    assert float(la.loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)), rel=1e-12)
    assert la.n_data == len(x)


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("name", CASES)
def test_the_basis_diagonalises_the_kronecker_factors(name, estimator):
    case = CASES[name]
    model, x, y = case.make()
    la = fit(model, case.likelihood, x, y, backend=("native", estimator))
    factors = naive.kron(model, x, y, case.likelihood, estimator, case.fallback)
    for vectors, fs, row in zip(la.H.eigenvectors, factors, la.coverage, strict=True):
        assert row[1] == ("diag" if row[0] in case.fallback else "ekfac")
        if row[1] == "diag":
            assert vectors == [None]
            continue
        for q, f in zip(vectors, fs, strict=True):
            turned = q.T @ f @ q
            assert naive.relative_error(torch.diag(turned.diagonal()), turned) < 1e-8
            assert naive.relative_error(q.T @ q, torch.eye(len(q), dtype=q.dtype)) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "two-classes", "regression", "sequence", "two-convolutions"])
def test_sampled_labels_are_those_of_the_dense_fisher(name):
    case = CASES[name]
    model, x, y = case.make()
    dense = fit(model, case.likelihood, x, y, backend=("native", "mc"), structure="full", seed=SEED, num_samples=2)
    la = fit(model, case.likelihood, x, y, backend=("native", "mc"), seed=SEED, num_samples=2)
    assert naive.relative_error(torch.cat(moments(la)), torch.cat(diagonal_in(la, dense.H))) < TOLERANCE


def test_both_passes_draw_the_same_labels():
    """Of one example and one draw, the sampled Fisher is one outer product: one second moment, if the basis is of that draw."""
    model, x, y = CASES["ten-classes"].make(n=1)
    la = fit(model, "classification", x, y, backend=("native", "mc"))
    assert la.backend.seed is None
    for table in moments(la):
        assert int((table > 1e-12 * table.sum()).sum()) == 1


def test_curvlinops_agrees():
    """As a black box, in float64, on weights that no positions share."""
    curvlinops = pytest.importorskip("curvlinops")
    for model, outputs in ((mlp(), 3), (mlp(bias=False, outputs=4), 4)):
        torch.manual_seed(0)
        model, x, y = model.double(), torch.randn(7, 3).double(), torch.randint(outputs, (7,))
        la = fit(model, "classification", x, y)
        operator = curvlinops.EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            list(model.parameters()),
            [(x, y)],
            check_deterministic=False,
            fisher_type="type-2",
            separate_weight_and_bias=True,
        )
        theirs = operator @ torch.eye(la.n_params, dtype=torch.float64)
        assert naive.relative_error(la.H.to_matrix(), theirs) < 1e-8


# --- laws ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_trace_and_distance(name):
    """The trace is the dense curvature's; the distance from the dense blocks is never more than Kron's, nor than diag's here."""
    case = CASES[name]
    model, x, y = case.make()
    full = naive.full(model, x, y, case.likelihood, "ggn")
    la, kron = (fit(model, case.likelihood, x, y, structure=s) for s in ("ekfac", "kron"))
    start = 0
    ours, theirs = la.H.to_matrix(), kron.H_facs.to_matrix()
    for q in bases(la):
        rows = slice(start, start + len(q))
        start += len(q)
        block = full[rows, rows]
        assert float(ours[rows, rows].trace()) == pytest.approx(float(block.trace()), rel=1e-10)
        assert float((ours[rows, rows] - block).norm()) <= float((theirs[rows, rows] - block).norm()) + 1e-10
    assert not ours[:3, -1].any()


def test_it_differs_from_kron_where_gradients_and_inputs_are_not_independent():
    model, x, y = CASES["mlp"].make(n=9)
    full = naive.full(model, x, y, "classification", "ggn")
    la, kron = (fit(model, "classification", x, y, structure=s) for s in ("ekfac", "kron"))
    rows = slice(0, 12)
    near = float((la.H.to_matrix() - full)[rows, rows].norm())
    assert near < 0.95 * float((kron.H_facs.to_matrix() - full)[rows, rows].norm())


def test_one_layer_and_one_example_are_the_dense_curvature():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(1, 4).double(), torch.tensor([1])
    la = fit(model, "classification", x, y)
    assert naive.relative_error(la.H.to_matrix(), naive.full(model, x, y, "classification", "ggn")) < TOLERANCE


class EKFACConformance(SumsConformance):
    """The laws of sums in a basis that is set."""

    hessian_structure = "ekfac"

    def make_laplace(self):
        la = super().make_laplace()
        la.basis = Eigenbasis.of(self.sums_of(la, 0, len(self.make_data()[1])))
        la.initialize(self.make_data()[0])
        return la


class TestExact(EKFACConformance):
    """The GGN."""


class TestSampled(EKFACConformance):
    """Draws belong to examples."""

    backend, kwargs = backend_class("native", "mc")
    backend_kwargs = {**kwargs, "seed": 5, "num_samples": 2}


class TestEmpirical(EKFACConformance):
    """One gradient for each example."""

    backend = backend_class("native", "ef")[0]


class TestLastLayer(EKFACConformance):
    """Without backward passes."""

    subset_of_weights = "last_layer"
    likelihood = "regression"


class TestShared(EKFACConformance):
    """A convolution, and a layer without factors."""

    def make_model(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(4, 3)
        ).double()


@pytest.mark.parametrize("positions", [1, 2, 3, 40])
def test_both_orders_of_the_products_are_one_number(positions):
    """Few positions are projected one by one, many after they are added up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * positions, 3)).double()
    x, y = torch.randn(6, positions, 5).double(), torch.randint(3, (6,))
    la = fit(model, "classification", x, y)
    full = naive.full(model, x, y, "classification", "ggn")
    assert naive.relative_error(torch.cat(moments(la)), torch.cat(diagonal_in(la, full))) < TOLERANCE


# --- no drift -----------------------------------------------------------------------------------------------------------


def based(x, y, estimator="ggn", subset="all"):
    """A float32 posterior with the basis of these examples."""
    la = test_drift.laplace(head(), "native", estimator, "ekfac", subset)
    la.basis = Eigenbasis.of(test_drift.summed(la, x, y, 512))
    return la


def reference(la, x, y, estimator):
    """Second moments of a linear layer by plain float64 arithmetic, in the basis as it is, by name."""
    f = head().double()(x.double()).detach()
    qb, qa = la.basis.vectors["0.weight/B"].double(), la.basis.vectors["0.weight/A"].double()
    squares = sum((v.double() @ qb).square() for v in directions(f, y, estimator))
    inputs = (x.double() @ qa).square()
    return {"0.weight/moments": squares.T @ inputs, "0.bias/moments": squares.sum(0)}


def check(sums, truth, bound=BOUND):
    assert sums.tensors.keys() == truth.keys()
    errors = {name: naive.relative_error(value, truth[name]) for name, value in sums.tensors.items()}
    assert max(errors.values()) <= bound, errors


@pytest.mark.parametrize("batch_size", [1, 7, 3000])
@pytest.mark.parametrize("data", ["falling", "rising", "one-large"])
@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
def test_many_batches(estimator, data, batch_size):
    x, y = worst(data, 300 if batch_size == 1 else 3000)
    la = based(x, y, estimator)
    check(test_drift.summed(la, x, y, batch_size), reference(la, x, y, estimator))


@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
def test_a_small_batch_counts_in_full_after_millions_of_examples(estimator):
    unsure, sure = test_drift.examples(torch.zeros(16)), test_drift.examples(torch.full((16,), 8.0))
    la = based(*unsure, estimator)
    alone = test_drift.summed(la, *sure, 16).to_tensors()
    total = times(test_drift.summed(la, *unsure, 16), 18)
    before = {name: value.clone() for name, value in total.to_tensors().items()}
    la.accumulate(total, *sure)
    for name, value in total.to_tensors().items():
        assert naive.relative_error(value - before[name], alone[name]) < 1e-3, name


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_any_partition_of_float32_equals_the_whole(subset):
    x, y = worst("falling", 600)
    la = based(x, y, subset=subset)
    whole = test_drift.summed(la, x, y, len(x))
    check(whole, reference(la, x, y, "ggn"))
    one, two, three = (test_drift.summed(la, x[a:b], y[a:b], 64, a) for a, b in ((0, 1), (1, 599), (599, 600)))
    check(three.merge(one.merge(two)), whole.tensors)


# --- the posterior ------------------------------------------------------------------------------------------------------


def dense_precision(la, temper=1.0):
    blocks = [(q * s) @ q.T for q, s in zip(bases(la), moments(la), strict=True)]
    return temper * torch.block_diag(*blocks) + torch.diag(la.prior_precision_diag)


@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
@pytest.mark.parametrize(
    "name", ["mlp", "regression", "two-convolutions", "sequence-output", "normed", "embedding", "tied"]
)
def test_evidence_and_predictive_are_those_of_the_dense_matrix(name, prior):
    case = CASES[name]
    model, x, y = case.make()
    la = fit(model, case.likelihood, x, y)
    temper = 1.0
    if case.likelihood == "regression":
        la.sigma_noise = 0.7
        temper = 1 / 0.49
    la.prior_precision = torch.linspace(0.5, 2, la.n_layers) if prior == "layerwise" else 0.7
    precision = dense_precision(la, temper)
    ratio = torch.linalg.slogdet(precision)[1] - la.prior_precision_diag.log().sum()
    assert float(la.log_det_ratio) == pytest.approx(float(ratio), rel=1e-10)
    assert float(la.log_det_posterior_precision) == pytest.approx(float(torch.linalg.slogdet(precision)[1]), rel=1e-10)
    scatter = (la.mean.square() * la.prior_precision_diag).sum()
    expected = la.log_likelihood - 0.5 * (ratio + scatter)
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(expected), rel=1e-10)
    js = naive.jacobians(model, x)
    covariance = naive.glm_covariance(js, precision)
    assert naive.relative_error(la.functional_variance(js), covariance) < TOLERANCE
    rows = js.flatten(0, 1)
    assert naive.relative_error(la.functional_covariance(rows), rows @ torch.linalg.inv(precision) @ rows.T) < TOLERANCE
    spread = glm_distribution(la, x, diagonal=True)[1].flatten(1)
    assert naive.relative_error(spread, covariance.diagonal(dim1=1, dim2=2)) < TOLERANCE
    value = la.mean + torch.linspace(-1, 1, la.n_params)
    delta = value - la.mean
    assert float(la.square_norm(value)) == pytest.approx(float(delta @ precision @ delta), rel=1e-10)
    constant = 0.5 * float(torch.linalg.slogdet(precision)[1]) - 0.5 * la.n_params * math.log(2 * math.pi)
    assert float(la.log_prob(value)) == pytest.approx(constant - 0.5 * float(delta @ precision @ delta), rel=1e-10)


def test_no_jacobian_is_made_for_a_predictive(monkeypatch):
    model, x, y = CASES["two-convolutions"].make()
    la = fit(model, "classification", x, y)
    monkeypatch.setattr(type(la.backend), "jacobians", lambda *_, **__: pytest.fail("a dense Jacobian"))
    assert la(x).shape == (5, 3)


def test_samples_have_the_posterior_covariance():
    model, x, y = CASES["mlp"].make()
    la = fit(model, "classification", x, y)
    la.prior_precision = 2.0
    samples = la.sample(40_000, generator=torch.Generator().manual_seed(0))
    covariance = torch.linalg.inv(dense_precision(la))
    assert naive.relative_error(torch.cov(samples.T), covariance) < 0.05
    assert float((samples.mean(0) - la.mean).norm()) < 0.05 * float(covariance.trace().sqrt())


@pytest.mark.parametrize("method", ["marglik", "gridsearch"])
def test_the_prior_is_tuned(method):
    model, x, y = CASES["mlp"].make(n=40)
    la = fit(model, "classification", x, y)
    la.prior_precision = 1e-3
    before = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(method=method, val_loader=loader(x, y), grid_size=9, n_steps=50)
    found = float(la.prior_precision)
    if method == "marglik":
        assert float(la.log_marginal_likelihood()) > before
        return
    scores = {}
    for value in torch.logspace(-4, 4, 9):
        la.prior_precision = value
        scores[float(value)] = float(-la(x).gather(1, y[:, None]).log().mean())
    assert found == pytest.approx(min(scores, key=scores.get), rel=1e-6)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_state_is_the_whole_posterior(subset, tmp_path):
    model, x, y = CASES["two-convolutions"].make()
    la = fit(model, "classification", x, y, subset)
    la.prior_precision = 3.0
    torch.save(la.state_dict(), tmp_path / "state.pt")
    other = Laplace(model, "classification", subset, "ekfac")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.basis.digest == la.basis.digest and other.sums.spec == la.sums.spec
    assert torch.equal(other(x), la(x)) and torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    for one in (la, other):
        one.fit(loader(x + 1, y), override=False)
    assert torch.equal(other(x), la(x))
    state = la.state_dict()
    state["basis"] = {name: value.roll(1, 0) for name, value in state["basis"].items()}
    with pytest.raises(ValueError, match="taken in the eigenbasis"):
        other.load_state_dict(state)
    assert other.basis.digest == la.basis.digest and torch.equal(other(x), la(x))


def test_the_last_layer_is_the_whole_of_a_linear_model_on_its_features():
    model, x, y = CASES["mlp"].make()
    la = fit(model, "classification", x, y, "last_layer")
    features = model[:2](x).detach()
    whole = fit(model[2], "classification", features, y)
    assert naive.relative_error(la.H.to_matrix(), whole.H.to_matrix()) < TOLERANCE
    assert naive.relative_error(la(x), whole(features)) < TOLERANCE


def test_more_data_adds_in_the_basis_that_there_is():
    model, x, y = CASES["mlp"].make(n=12)
    la = fit(model, "classification", x[:6], y[:6])
    basis = la.basis.digest
    la.fit(loader(x[6:], y[6:]), override=False)
    assert la.basis.digest == basis and la.n_data == 12
    full = naive.full(model, x, y, "classification", "ggn")
    assert naive.relative_error(torch.cat(moments(la)), torch.cat(diagonal_in(la, full))) < TOLERANCE


def test_before_a_fit_there_is_the_prior():
    model, x, _ = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", "ekfac", prior_precision=2.0)
    assert isinstance(la, EKFACLaplace) and not la.H.to_matrix().any()
    assert float(la.log_prob(torch.zeros(la.n_params))) == pytest.approx(
        0.5 * la.n_params * math.log(2 / (2 * math.pi))
    )
    with pytest.raises(RuntimeError, match="has not been fitted"):
        la(x)


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", REFUSING)
def test_other_backends_refuse_by_name(backend):
    cls = backend_class(*backend)[0]
    with pytest.raises(ValueError, match=rf"{cls.__name__} has no 'ekfac' curvature.*[Nn]ative"):
        Laplace(mlp(), "classification", "all", "ekfac", backend=cls)


def test_a_backend_of_ones_own_that_gives_factors_alone_is_refused():
    with pytest.raises(ValueError, match="UserGGN has no 'ekfac' curvature"):
        Laplace(mlp(), "classification", "last_layer", "ekfac", backend=UserGGN)


def test_a_diagonal_prior_is_refused():
    la = Laplace(mlp(), "classification", "all", "ekfac")
    with pytest.raises(ValueError, match="EKFAC takes a scalar or layerwise prior precision"):
        la.prior_precision = torch.ones(la.n_params)


def test_sums_of_two_bases_are_not_added():
    model, x, y = CASES["mlp"].make(n=12)
    one, two = fit(model, "classification", x[:6], y[:6]), fit(model, "classification", x[6:], y[6:])
    with pytest.raises(ValueError, match=rf"basis '{one.basis.digest}' against '{two.basis.digest}'"):
        one.sums.merge(two.sums)
    with pytest.raises(ValueError, match="taken in the eigenbasis"):
        one.set_sums(two.sums)
    with pytest.raises(ValueError, match=rf"taken in the eigenbasis {two.basis.digest}, but that at hand is"):
        spec, tensors = two.sums.spec, two.sums.to_tensors()
        one.accumulate(CurvatureSums.from_tensors(spec, tensors, 6), x, y)
    assert torch.equal(one.H.to_matrix(), fit(model, "classification", x[:6], y[:6]).H.to_matrix())


def test_a_basis_of_another_model_is_refused():
    model, x, y = CASES["mlp"].make()
    la = Laplace(mlp(hidden=5).double(), "classification", "all", "ekfac")
    la.basis = fit(model, "classification", x, y).basis
    with pytest.raises(ValueError, match=r"do not fit '0.weight'.*another model"):
        la.initialize(x)


def test_a_loader_that_cannot_be_passed_through_twice_is_refused():
    model, x, y = CASES["mlp"].make()
    la = fit(model, "classification", x, y)
    before = la(x)
    with pytest.raises(ValueError, match="An EKFAC fit passes over the data several times"):
        la.fit(iter([(x, y)]))

    class Changing:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            yield x * self.passes, y

    with pytest.raises(ValueError, match="The data changes between passes: 5 examples"):
        la.fit(Changing())
    assert torch.equal(la(x), before)


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_failed_pass_leaves_the_earlier_fit(bad_pass):
    model, x, y = CASES["mlp"].make()
    la = fit(model, "classification", x, y)
    before, digest = la(x), la.basis.digest

    class Failing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield x, y
            yield (x * float("nan") if self.passes == bad_pass else x), y

    with pytest.raises(ValueError, match="NaN"):
        la.fit(Failing())
    assert torch.equal(la(x), before) and la.basis.digest == digest
    la.fit(loader(x, y), override=False)
    assert la.n_data == 10


def test_subnetworks_are_refused():
    with pytest.raises(ValueError, match="no Laplace approximation for subnetwork × ekfac"):
        Laplace(mlp(), "classification", "subnetwork", "ekfac")


def test_a_convolution_of_many_positions_in_float32():
    """The default precision, against dense Jacobians in float64 in the same basis."""
    torch.manual_seed(0)
    model = conv(nn.Conv2d(2, 3, 3, padding=1), 192)
    x, y = torch.randn(5, 2, 8, 8), torch.randint(3, (5,))
    la = fit(model, "classification", x, y)
    found, basis = torch.cat(moments(la)).clone(), la
    full = naive.full(model.double(), x.double(), y, "classification", "ggn")
    assert naive.relative_error(found, torch.cat(diagonal_in(basis, full))) < 2e-6
