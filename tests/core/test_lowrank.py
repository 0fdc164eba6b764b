"""Low-rank posteriors against the dense matrix that they stand for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import laplace.curvature
from laplace import Laplace, LowRankLaplace, NotFittedError
from laplace.baselaplace import LowRankLaplace as FromItsPath
from laplace.curvature import NativeGGN, NativeHessian
from laplace.errors import NonFiniteError
from laplace.tuning import prior_precision_grid, score_grid

from . import naive
from .models import CASES, loader
from .test_hessian import naive_hessian

NAMES = ("mlp", "regression", "frozen", "stride-padding", "tied", "normed", "sequence-output", "embedding")
PRIORS = ("scalar", "layerwise", "diag")


def prior_of(model, kind):
    params = [p for p in model.parameters() if p.requires_grad]
    size = {"scalar": 1, "layerwise": len(params), "diag": sum(p.numel() for p in params)}[kind]
    return 0.3 + torch.rand(size, generator=torch.Generator().manual_seed(2)).double()


def fitted(name, prior="scalar", n=9, low_rank=4, dtype=torch.float64, **kwargs):
    case = CASES[name]
    model, x, y = case.make(n=n, dtype=dtype)
    if case.likelihood == "regression":
        kwargs = {"sigma_noise": 0.6, **kwargs}
    la = Laplace(
        model,
        case.likelihood,
        "all",
        "lowrank",
        prior_precision=prior_of(model, prior),
        temperature=0.8,
        backend_kwargs={"low_rank": low_rank},
        **kwargs,
    )
    la.fit(loader(x, y, 4))
    return la, x, y


def dense_precision(la):
    (vectors, values), prior = la.posterior_precision
    return (vectors * values) @ vectors.T + torch.diag(prior)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", NAMES)
def test_every_quantity_equals_its_dense_definition(name, prior):
    la, x, y = fitted(name, prior)
    model, case = la.model, CASES[name]
    h = naive_hessian(model, x, y, case.likelihood) / (float(la.sigma_noise) ** 2 * 0.8)
    values, vectors = torch.linalg.eigh(h)
    keep = values > torch.maximum(values[-4], values[-1] * 1e-9) - 1e-12
    params = [p for p in model.parameters() if p.requires_grad]
    p0 = prior_of(model, prior)
    if prior == "layerwise":
        p0 = torch.cat([v.expand(p.numel()) for v, p in zip(p0, params, strict=True)])
    p0 = p0.expand(len(h))
    precision = (vectors[:, keep] * values[keep]) @ vectors[:, keep].T + torch.diag(p0)
    assert isinstance(la, LowRankLaplace)
    assert 1 <= la.H[0].shape[1] <= 4
    torch.testing.assert_close(dense_precision(la), precision, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(la.log_det_posterior_precision, torch.logdet(precision), rtol=1e-9, atol=1e-9)
    covariance = torch.linalg.inv(precision)
    torch.testing.assert_close(torch.diag(1 / p0) - la.V @ la.Kinv @ la.V.T, covariance, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(la.V, la.H[0] / p0[:, None])
    point = la.mean + torch.linspace(-1, 1, len(h)).double()
    torch.testing.assert_close(
        la.square_norm(point), (point - la.mean) @ precision @ (point - la.mean), rtol=1e-7, atol=1e-8
    )
    normal = torch.distributions.MultivariateNormal(la.mean, precision_matrix=precision)
    torch.testing.assert_close(la.log_prob(point), normal.log_prob(point), rtol=1e-7, atol=1e-7)
    js = naive.jacobians(model, x)
    expected = naive.glm_covariance(js, precision)
    torch.testing.assert_close(la.functional_variance(js), expected, rtol=1e-7, atol=1e-9)
    flat = js.flatten(0, 1)
    torch.testing.assert_close(la.functional_covariance(flat), flat @ covariance @ flat.T, rtol=1e-7, atol=1e-9)
    capture = la.backend.capture(x)
    torch.testing.assert_close(
        la._glm_variance(capture, [la.prior_precision], False)[0], expected, rtol=1e-7, atol=1e-9
    )
    capture = la.backend.capture(x)
    diagonal = la._glm_variance(capture, [la.prior_precision], True)[0]
    torch.testing.assert_close(diagonal, expected.diagonal(dim1=1, dim2=2), rtol=1e-7, atol=1e-9)
    assert la.n_data == len(x)
    assert float(la.loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)))
    evidence = la.log_likelihood - (la.log_det_posterior_precision - p0.log().sum() + (la.mean**2 * p0).sum()) / 2
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence)


@pytest.mark.parametrize("prior", PRIORS)
def test_samples_have_the_posterior_covariance(prior):
    """Exactly: samples are a linear map of the noise."""
    la, _, _ = fitted("mlp", prior)
    maps = []

    def identity(n, size, **kwargs):
        maps.append(torch.eye(size, dtype=torch.float64))
        return maps[-1]

    original = torch.randn
    torch.randn = identity
    try:
        root = la.sample(la.n_params) - la.mean
    finally:
        torch.randn = original
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(dense_precision(la)), rtol=1e-8, atol=1e-10)
    one = la.sample(3, torch.Generator().manual_seed(1))
    assert one.shape == (3, la.n_params)
    assert torch.equal(one, la.sample(3, torch.Generator().manual_seed(1)))
    assert not torch.equal(one, la.sample(3, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("backend", ["NativeHessian", "AsdlHessian", "AsdfghjklHessian", "CurvlinopsHessian"])
def test_hessian_backends_agree(backend):
    ours, x, _ = fitted("regression")
    la, _, _ = fitted("regression", backend=getattr(laplace.curvature, backend))
    assert isinstance(ours.backend, NativeHessian)
    for one, two in zip(la(x), ours(x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(la.log_marginal_likelihood(), ours.log_marginal_likelihood())


@pytest.mark.parametrize("backend", ["NativeGGN", "NativeEF", "CurvlinopsGGN", "AsdlGGN", "BackPackGGN"])
def test_with_all_eigenpairs_it_is_the_full_posterior(backend):
    cls = getattr(laplace.curvature, backend)
    case = CASES["regression"]
    model, x, y = case.make(n=6)
    kwargs = {"backend": cls, "prior_precision": 0.5, "sigma_noise": 0.7}
    low = Laplace(model, "regression", "all", "lowrank", backend_kwargs={"low_rank": 26}, **kwargs)
    full = Laplace(model, "regression", "all", "full", **kwargs)
    low.fit(loader(x, y))
    full.fit(loader(x, y))
    for one, two in zip(low(x), full(x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(low.log_marginal_likelihood(), full.log_marginal_likelihood())


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_predictives_of_classifiers(link):
    la, x, _ = fitted("mlp", backend=NativeGGN)
    probabilities = la(x, link_approx=link, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(x)).double())
    assert la(x, pred_type="nn", link_approx="mc").shape == (9, 3)
    assert la.predictive_samples(x, n_samples=7).shape == (7, 9, 3)


def test_joint_predictive_of_regression():
    la, x, _ = fitted("regression")
    mean, covariance = la(x, joint=True)
    js = naive.jacobians(la.model, x).flatten(0, 1)
    torch.testing.assert_close(covariance, js @ torch.linalg.inv(dense_precision(la)) @ js.T, rtol=1e-7, atol=1e-9)
    assert mean.shape == (18,)


def test_gradients_pass_to_the_inputs():
    la, x, _ = fitted("regression", enable_backprop=True, backend=NativeGGN)
    assert torch.autograd.gradcheck(lambda z: la(z)[1].diagonal(dim1=1, dim2=2).sum(), x[:2].clone().requires_grad_())


def test_the_evidence_is_differentiable_in_prior_and_noise():
    la, _, _ = fitted("regression")
    prior, noise = torch.tensor([0.7]).double().requires_grad_(), torch.tensor(0.5).double().requires_grad_()
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior, noise))
    layers = torch.linspace(0.5, 1.5, la.n_layers).double().requires_grad_()
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (layers,))


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_tuning_by_evidence_climbs(structure):
    la, _, _ = fitted("regression")
    la.prior_precision = 1.0
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=40)
    assert la.log_marginal_likelihood() > before + 1e-3
    assert len(la.prior_precision) == {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}[structure]


@pytest.mark.parametrize("link", ["probit", "bridge"])
def test_grid_search_scores_each_prior_as_if_it_were_set(link):
    la, x, y = fitted("mlp")
    grid = prior_precision_grid(-2, 2, 5)
    total, n = score_grid(la, loader(x, y), grid, link_approx=link)
    assert n == len(y)
    for value, score in zip(grid, total, strict=True):
        la.prior_precision = value
        expected = -la(x, link_approx=link).gather(1, y[:, None]).log().sum()
        torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-12)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y), grid_size=7, link_approx=link)


def test_small_variances_survive_float32():
    """Prior variances of 1e6 minus almost all of themselves: float32 alone would leave noise."""
    precise, x, _ = fitted("regression", low_rank=20, backend=NativeGGN)
    la, x32, _ = fitted("regression", low_rank=20, backend=NativeGGN, dtype=torch.float32)
    la.H = precise.H[0].float(), precise.H[1].float()
    precise.H = la.H[0].double(), la.H[1].double()
    la.prior_precision = precise.prior_precision = 1e-6
    ones, twos = la.backend.capture(x32), precise.backend.capture(x)
    for diagonal in (True, False):
        one = la._glm_variance(ones, [la.prior_precision], diagonal)
        two = precise._glm_variance(twos, [precise.prior_precision], diagonal)
        assert one.dtype == torch.float32
        assert naive.relative_error(one, two) < 1e-3
        ones, twos = la.backend.capture(x32), precise.backend.capture(x)


def test_state_dict_round_trip():
    la, x, _ = fitted("regression", "layerwise")
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    again = Laplace(copy.deepcopy(la.model), "regression", "all", "lowrank")
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for one, two in zip(again(x), la(x), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    other = Laplace(copy.deepcopy(la.model), "regression", "all", "full")
    with pytest.raises(ValueError, match="cls_name is 'LowRankLaplace'"):
        other.load_state_dict(la.state_dict())


def test_it_does_not_add_up():
    la, x, y = fitted("mlp")
    before = la(x)
    for attempt in (
        lambda: la.fit(loader(x, y), override=False),
        lambda: la.zero_sums(),
        lambda: la.accumulate(la.sums, x, y),
        lambda: la.sums.merge(la.sums),
    ):
        with pytest.raises(ValueError, match="do not add up.*once over"):
            attempt()
    assert torch.equal(la(x), before)
    la.fit(loader(x[:5], y[:5]))
    assert la.n_data == 5


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, y: x[7].fill_(torch.nan), NonFiniteError, "indices 7"),
        (lambda x, y: y[8].fill_(3), ValueError, "Label 3 of example 8"),
        (lambda x, y: (x.resize_(0, 3), y.resize_(0)), ValueError, "empty"),
    ],
    ids=["nan", "label", "empty"],
)
def test_bad_data_leaves_an_earlier_fit_as_it_was(change, error, message, earlier):
    la, x, y = fitted("mlp")
    if not earlier:
        la = LowRankLaplace(la.model, "classification")
    else:
        before = la(x)
    bad_x, bad_y = x.clone(), y.clone()
    change(bad_x, bad_y)
    with pytest.raises(error, match=message):
        la.fit(loader(bad_x, bad_y, 4))
    if earlier:
        assert torch.equal(la(x), before)
        assert la.sums_spec() is la.backend.spec is la.sums.spec
    else:
        for quantity in (lambda: la(x), la.sums_spec):
            with pytest.raises(NotFittedError):
                quantity()


def test_what_else_it_refuses():
    model, x, y = CASES["mlp"].make()
    with pytest.raises(ValueError, match="no Laplace approximation for last_layer × lowrank.*all × lowrank"):
        Laplace(model, "classification", "last_layer", "lowrank")
    with pytest.raises(ValueError, match="give a DataLoader or list, not an iterator"):
        Laplace(model, "classification", "all", "lowrank").fit(iter([(x, y)]))
    flat = nn.Linear(3, 1, bias=False).double()
    with pytest.raises(ValueError, match="no positive eigenvalue.*Train the model"):
        Laplace(flat, "regression", "all", "lowrank").fit([(torch.zeros(2, 3).double(), torch.zeros(2, 1).double())])
    assert FromItsPath is LowRankLaplace
    fit = Laplace(model, "classification", "all", "lowrank")
    fit.fit(loader(x, y))
    assert {row[1] for row in fit.coverage} == {"lowrank"}


def test_gradients_without_a_derivative_are_said():
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(5, 3), torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"lowrank.*\(Sequential\).*_embedding_bag_backward.*Use 'kron'"):
        Laplace(model, "classification", "all", "lowrank").fit([(torch.randint(5, (4, 3)), torch.tensor([0, 1, 1, 0]))])
