"""Subnetwork posteriors, against the dense matrices of the whole network restricted by indexing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

from laplace import DiagLaplace, DiagSubnetLaplace, FullSubnetLaplace, Laplace, SubnetLaplace, subnetlaplace
from laplace.curvature import (
    CurvatureInterface,
    EFInterface,
    GGNInterface,
    NativeEF,
    NativeGGN,
    NativeHessian,
    backend_class,
)
from laplace.curvature.conformance import SumsConformance
from laplace.structures.specification import SumsSpec
from tests.core import naive
from tests.core.models import CASES, loader, mlp

STRUCTURES = {"full": FullSubnetLaplace, "diag": DiagSubnetLaplace}


def choose(n, k, seed=0):
    """``k`` sorted indices out of ``n``."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def subnet(model, likelihood, structure, indices, **kwargs):
    return Laplace(model, likelihood, "subnetwork", structure, subnetwork_indices=indices, **kwargs)


def fitted(structure="full", likelihood="classification", k=7, **kwargs):
    model, x, y = CASES["mlp" if likelihood == "classification" else "regression"].make()
    indices = choose(sum(p.numel() for p in model.parameters()), k)
    la = subnet(model, likelihood, structure, indices, **kwargs)
    la.fit(loader(x, y))
    return la, x, y


def dense_precision(la, x, y, estimator="ggn", prior=1.0):
    """Posterior precision over the subnetwork from the whole network's dense curvature."""
    h = naive.full(la.model, x, y, la.likelihood.value, estimator)[la.subnetwork_indices][:, la.subnetwork_indices]
    h = h / la.sigma_noise**2 / la.temperature
    return (torch.diag(h.diagonal()) if la.structure == "diag" else h) + torch.eye(len(h)) * prior


# --- curvature and algebra -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("name", CASES)
def test_curvature_and_variance_are_those_of_the_whole_network_restricted(name, estimator):
    case = CASES[name]
    model, x, y = case.make()
    n = sum(p.numel() for p in trainable(model))
    whole = naive.full(model, x, y, case.likelihood, estimator)
    js = naive.jacobians(model, x)
    for k in (1, n // 3, n):
        indices = choose(n, k, seed=k)
        truth = whole[indices][:, indices]
        for structure in STRUCTURES:
            la = subnet(
                model, case.likelihood, structure, indices, backend=NativeEF if estimator == "ef" else NativeGGN
            )
            la.fit(loader(x, y))
            assert naive.relative_error(la.H, truth if structure == "full" else truth.diagonal()) < 1e-10
            covariance = naive.glm_covariance(js[..., indices], dense_precision(la, x, y, estimator))
            ours = la._glm_variance(la.backend.capture(x), [la.prior_precision], False)[0]
            assert naive.relative_error(ours, covariance) < 1e-10
            variance = la._glm_variance(la.backend.capture(x), [la.prior_precision], True)[0]
            assert naive.relative_error(variance, covariance.diagonal(dim1=1, dim2=2)) < 1e-10
            assert la.loss.item() == pytest.approx(naive.loss(model, x, y, case.likelihood).item(), rel=1e-10)


@pytest.mark.parametrize("name", ["mlp", "stride-padding", "tied", "sequence-output", "frozen"])
@pytest.mark.parametrize("enable_backprop", [False, True])
def test_jacobians_have_the_chosen_columns(name, enable_backprop):
    model, x, y = CASES[name].make()
    indices = choose(sum(p.numel() for p in trainable(model)), 6)
    backend = NativeGGN(model, CASES[name].likelihood, subnetwork_indices=indices)
    js, f = backend.jacobians(x, enable_backprop)
    assert naive.relative_error(js.detach(), naive.jacobians(model, x)[..., indices]) < 1e-10
    torch.testing.assert_close(f.detach(), model(x).detach())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_algebra_against_dense_gaussians(structure, likelihood):
    extra = {"sigma_noise": 0.7} if likelihood == "regression" else {"temperature": 0.5}
    la, x, y = fitted(structure, likelihood, prior_precision=2.0, prior_mean=0.1, **extra)
    precision = dense_precision(la, x, y, prior=2.0)
    k = len(precision)
    delta = la.mean_subnet - 0.1
    assert la.scatter.item() == pytest.approx(2 * float(delta @ delta))
    assert la.log_det_prior_precision.item() == pytest.approx(k * math.log(2))
    assert la.log_det_posterior_precision.item() == pytest.approx(precision.logdet().item(), rel=1e-10)
    evidence = la.log_likelihood - 0.5 * (precision.logdet() - k * math.log(2) + 2 * delta @ delta)
    assert la.log_marginal_likelihood().item() == pytest.approx(evidence.item(), rel=1e-10)
    gaussian = torch.distributions.MultivariateNormal(la.mean_subnet, precision_matrix=precision)
    value = la.mean_subnet + torch.linspace(-1, 1, k, dtype=torch.float64)
    assert la.log_prob(value).item() == pytest.approx(gaussian.log_prob(value).item(), rel=1e-10)
    everything = la.mean.clone() + 5  # entries outside the subnetwork have no density and are left out
    everything[la.subnetwork_indices] = value
    assert la.log_prob(everything).item() == pytest.approx(gaussian.log_prob(value).item(), rel=1e-10)
    assert la.prior_precision_diag.tolist() == [2.0] * k
    if likelihood == "regression":
        mean, covariance = la(x)
        truth = naive.glm_covariance(naive.jacobians(la.model, x)[..., la.subnetwork_indices], precision)
        torch.testing.assert_close(covariance, truth)
        torch.testing.assert_close(mean, la.model(x).detach())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_vary_inside_the_subnetwork_alone(structure):
    la, x, y = fitted(structure)
    samples = la.sample(20000, torch.Generator().manual_seed(0))
    n = la.n_params
    outside = [i for i in range(n) if i not in la.subnetwork_indices.tolist()]
    assert samples.shape == (20000, n)
    assert torch.equal(samples[:, outside], la.mean[outside].expand(20000, -1))
    inside = samples[:, la.subnetwork_indices]
    covariance = torch.linalg.inv(dense_precision(la, x, y))
    scale = covariance.diagonal().sqrt()
    # standard errors: sigma / sqrt(20000) of a mean, sigma_i sigma_j sqrt(2 / 20000) of a covariance; five of each
    assert bool(((inside.mean(0) - la.mean_subnet).abs() < 5 * scale / 20000**0.5).all())
    error = (inside.T.cov() - covariance).abs() / torch.outer(scale, scale)
    assert float(error.max()) < 5 * (2 / 20000) ** 0.5
    draws = torch.arange(14.0, dtype=torch.float64).reshape(2, 7)
    assembled = la.assemble_full_samples(draws)
    assert torch.equal(assembled[:, la.subnetwork_indices], draws)
    assert torch.equal(assembled[:, outside], la.mean[outside].expand(2, -1))
    for wrong in (la.sample(2), draws[:, :1], draws[0]):
        with pytest.raises(ValueError, match="Draws of the subnetwork have shape"):
            la.assemble_full_samples(wrong)


def test_network_samples_use_the_assembled_parameters():
    la, x, _ = fitted("full")
    vectors = la.sample(3, torch.Generator().manual_seed(1))
    outputs = []
    for vector in vectors:
        parts = vector.split([p.numel() for p in la.params])
        names = [name for name, _ in la.model.named_parameters()]
        weights = {n: v.view_as(p) for n, v, p in zip(names, parts, la.params, strict=True)}
        outputs.append(functional_call(la.model, weights, (x,)).softmax(-1))
    ours = la(x, pred_type="nn", link_approx="mc", n_samples=3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, torch.stack(outputs).mean(0).detach())


# --- what is not computed --------------------------------------------------------------------------------------------


class Forbidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("a parameter outside the subnetwork was differentiated")


class Guarded(nn.Module):
    """Its first layer's own parameters must not be differentiated."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        weight = Forbidden.apply(self.first.weight)
        return self.last(torch.tanh(nn.functional.linear(x, weight, self.first.bias)))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tensors_without_chosen_entries_are_not_differentiated(structure):
    torch.manual_seed(0)
    model = Guarded().double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(AssertionError, match="outside the subnetwork"):
        Laplace(model, "classification", "all", structure).fit(loader(x, y))
    la = subnet(model, "classification", structure, torch.tensor([17, 30]))  # both in the last layer
    la.fit(loader(x, y))
    assert la(x).shape == (5, 3)
    rows = [(name, reason) for name, _, reason in la.coverage]
    assert rows == [("last.weight", "Linear; 1 of 12 entries"), ("last.bias", "Linear; 1 of 3 entries")]


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_row_of_all_parameters_per_example(structure):
    torch.manual_seed(0)
    model = mlp(inputs=60, outputs=10, hidden=50).double()  # 3560 parameters
    n = sum(p.numel() for p in model.parameters())
    x, y = torch.randn(16, 60, dtype=torch.float64), torch.arange(16) % 10
    la = subnet(model, "classification", structure, torch.tensor([0, 7, 3001, 3555]))
    with LargestTensor() as seen:
        la.fit(loader(x, y, batch_size=16))
        la(x)
    # the parameter vector itself (or output gradients of a layer, 16 × 10 × 50), never a row per example: 16 n
    assert n <= seen.largest < 3 * n


# --- sums ------------------------------------------------------------------------------------------------------------


class SubnetSums(SumsConformance):
    subset_of_weights = "subnetwork"

    def make_laplace(self):
        la = subnet(self.make_model(), self.likelihood, self.hessian_structure, torch.tensor([0, 3, 13, 18, 27, 30]))
        la.initialize(self.make_data()[0])
        return la


class TestFullSubnetSums(SubnetSums):
    hessian_structure = "full"


class TestDiagSubnetSums(SubnetSums):
    hessian_structure = "diag"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fit_adds_to_an_earlier_fit(structure):
    la, x, y = fitted(structure)
    once = la.H.clone()
    la.fit(loader(x, y), override=False)
    torch.testing.assert_close(la.H, 2 * once)
    assert la.n_data == 2 * len(x)


def test_sums_of_another_subnetwork_are_refused():
    la, x, _ = fitted("full")
    other = subnet(la.model, "classification", "full", choose(31, 7, seed=1))
    other.initialize(x)
    with pytest.raises(ValueError, match="cannot be added: .*parameter '0.weight' differs"):
        other.zero_sums().merge(la.sums)
    with pytest.raises(ValueError, match="do not fit this 'full' posterior .* or are of another subnetwork"):
        other.set_sums(la.sums)
    with pytest.raises(ValueError, match="do not fit"):
        Laplace(la.model, "classification", "all", "full").set_sums(la.sums)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_state_survives(structure, tmp_path):
    la, x, y = fitted(structure, prior_precision=torch.linspace(1, 2, 7))
    torch.save(la.state_dict(), tmp_path / "state.pt")
    again = subnet(la.model, "classification", structure, la.subnetwork_indices)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(again(x), la(x), rtol=0, atol=0)
    spec = la.sums_spec()
    assert SumsSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    torch.save(la, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    torch.testing.assert_close(whole(x), la(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="another subnetwork"):
        subnet(la.model, "classification", structure, choose(31, 7, 1)).load_state_dict(la.state_dict())


class UserGGN(GGNInterface):
    """A user's backend that knows nothing of subnetworks: dense Jacobians from the interface."""


class UserEF(EFInterface):
    """Likewise for the empirical Fisher."""


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backend, native", [(UserGGN, NativeGGN), (UserEF, NativeEF)])
def test_users_backends_follow(structure, backend, native):
    ours, x, _ = fitted(structure, backend=native)
    theirs, _, _ = fitted(structure, backend=backend)
    torch.testing.assert_close(theirs.H, ours.H)
    torch.testing.assert_close(theirs(x), ours(x))


# --- priors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_prior_per_subnetwork_parameter(structure):
    prior = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    la, x, y = fitted(structure, prior_precision=prior)
    precision = dense_precision(la, x, y, prior=0.0) + torch.diag(prior)
    assert la.log_det_posterior_precision.item() == pytest.approx(precision.logdet().item(), rel=1e-10)
    truth = naive.glm_covariance(naive.jacobians(la.model, x)[..., la.subnetwork_indices], precision)
    ours = la._glm_variance(la.backend.capture(x), [la.prior_precision], False)[0]
    torch.testing.assert_close(ours, truth)


def test_prior_mean_may_cover_all_parameters():
    mean = torch.linspace(-1, 1, 31, dtype=torch.float64)
    la, _, _ = fitted("full", prior_mean=mean)
    delta = la.mean_subnet - mean[la.subnetwork_indices]
    assert la.scatter.item() == pytest.approx(float(delta @ delta))
    la.prior_mean = mean[la.subnetwork_indices]
    assert la.scatter.item() == pytest.approx(float(delta @ delta))
    with pytest.raises(ValueError, match=r"shape \(9,\); valid are a scalar or \(7,\) or \(31,\)"):
        la.prior_mean = torch.zeros(9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_priors_are_tuned(structure):
    la, x, y = fitted(structure)
    before = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(method="marglik", prior_structure="scalar", n_steps=50)
    scalar = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(method="marglik", prior_structure="diag", n_steps=100)
    assert before < scalar < la.log_marginal_likelihood().item()
    assert la.prior_precision.shape == (7,)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y), grid_size=5)
    assert la.prior_precision.shape == (1,)
    with pytest.raises(ValueError, match="no 'layerwise' prior; valid prior_structures are 'scalar', 'diag'"):
        la.optimize_prior_precision(method="marglik", prior_structure="layerwise")
    with pytest.raises(ValueError, match=r"valid are a scalar, 7 values \(one per parameter\)"):
        la.prior_precision = torch.ones(4)


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices, message",
    [
        (None, "is None; it has to be a non-empty 1-D LongTensor without repeats, .*0…30"),
        ([0, 1], "is list; it has to be"),
        (torch.tensor([0.0, 1.0]), "is a tensor of torch.float32"),
        (torch.tensor([True, False]), "is a tensor of torch.bool"),
        (torch.tensor([], dtype=torch.int64), r"has shape \(0,\)"),
        (torch.tensor([[0, 1]]), r"has shape \(1, 2\)"),
        (torch.tensor(3), r"has shape \(\)"),
        (torch.tensor([0, 31]), "holds 31, which is out of range"),
        (torch.tensor([-1, 2]), "holds -1, which is out of range"),
        (torch.tensor([2, 2, 5]), "repeats 2"),
        (torch.tensor([0, 5, 2, 5]), "repeats 5"),
    ],
)
def test_wrong_indices_say_what_is_wrong(indices, message):
    for structure in STRUCTURES:
        with pytest.raises(ValueError, match=f"subnetwork_indices {message}"):
            subnet(mlp(), "classification", structure, indices)


def test_subnetworks_are_full_or_diagonal():
    with pytest.raises(ValueError, match="no Laplace approximation for subnetwork × kron; available are"):
        subnet(mlp(), "classification", "kron", torch.tensor([0]))
    backend = NativeGGN(mlp(), "classification", subnetwork_indices=torch.tensor([0]))
    with pytest.raises(ValueError, match="nor Kronecker factors; subnetworks take 'full' or 'diag'"):
        backend.kron(torch.randn(2, 3), torch.tensor([0, 1]), N=2)
    for structure in ("ekfac", "blockdiag"):
        with pytest.raises(ValueError, match="neither a block of a layer nor Kronecker factors"):
            backend.initialize(torch.randn(2, 3), structure)


def test_names_and_attributes():
    la, _, _ = fitted("diag")
    assert isinstance(la, DiagSubnetLaplace) and isinstance(la, SubnetLaplace) and isinstance(la, DiagLaplace)
    assert subnetlaplace.FullSubnetLaplace is FullSubnetLaplace
    assert (la.n_params, la.n_params_subnet, len(la.mean), len(la.mean_subnet)) == (31, 7, 31, 7)
    assert torch.equal(la.mean_subnet, parameters_to_vector(la.model.parameters()).detach()[la.subnetwork_indices])
    positional = FullSubnetLaplace(mlp(), "regression", torch.tensor([1, 2]), 0.5, 3.0)
    assert (positional.sigma_noise.item(), positional.prior_precision.tolist()) == (0.5, [3.0])


# --- indices in any order --------------------------------------------------------------------------------------------

ORDER = torch.tensor([27, 3, 14, 0, 30, 13])


@pytest.mark.parametrize("backend", [None, "curvlinops", "asdl", GGNInterface])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_results_are_in_the_order_of_the_indices(structure, backend):
    """Algebra against dense Gaussians of ``H_full[I][:, I]``, in the order in which the indices were given."""
    model, x, y = CASES["mlp"].make(n=6)
    backend = backend_class(backend)[0] if isinstance(backend, str) else backend
    la = subnet(model, "classification", structure, ORDER, backend=backend)
    la.fit(loader(x, y))
    h = naive.full(model, x, y, "classification", "ggn")[ORDER][:, ORDER]
    h = h if structure == "full" else torch.diag(h.diagonal())
    assert naive.relative_error(la.H if structure == "full" else torch.diag(la.H), h) < 1e-9
    prior = torch.arange(1.0, 7.0, dtype=torch.float64)
    la.prior_precision = prior
    precision = h + torch.diag(prior)
    js = naive.jacobians(model, x)[..., ORDER]
    covariance = naive.glm_covariance(js, precision)
    found, _ = la.backend.jacobians(x)
    assert naive.relative_error(found, js) < 1e-9
    assert naive.relative_error(la.backend.jacobians(x, enable_backprop=True)[0].detach(), js) < 1e-9
    assert naive.relative_error(la.functional_variance(found), covariance) < 1e-9
    capture = la.backend.capture(x)
    assert naive.relative_error(la._glm_variance(capture, [la.prior_precision], False)[0], covariance) < 1e-9
    vector = parameters_to_vector(model.parameters()).detach()
    assert torch.equal(la.mean_subnet, vector[ORDER])
    value = vector + torch.linspace(0, 1, 31, dtype=torch.float64)
    delta = (value - vector)[ORDER]
    assert float(la.square_norm(value)) == pytest.approx(float(delta @ precision @ delta))
    draws = la.sample(20000, torch.Generator().manual_seed(0))
    spread = torch.linalg.inv(precision).diagonal().sqrt()
    assert torch.allclose(draws.std(0)[ORDER], spread, rtol=0.03)
    assert float(draws.std(0).sum()) == pytest.approx(float(draws.std(0)[ORDER].sum()))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_order_changes_no_prediction_and_survives_a_state(structure):
    model, x, y = CASES["mlp"].make(n=6)
    one, two = (subnet(model, "classification", structure, i) for i in (ORDER, ORDER.sort().values))
    for la in (one, two):
        la.fit(loader(x, y))
    assert torch.allclose(one(x), two(x))
    assert torch.allclose(one.log_marginal_likelihood(), two.log_marginal_likelihood())
    again = subnet(model, "classification", structure, ORDER)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.H, one.H)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_indices_that_are_not_given_are_a_missing_argument(structure):
    with pytest.raises(TypeError, match="subnetwork_indices"):
        Laplace(mlp(), "classification", "subnetwork", structure)


def test_backends_that_cannot_work_are_refused_when_the_posterior_is_made():
    class NoSubnetwork(GGNInterface):
        def __init__(self, model, likelihood, last_layer=False, dict_key_x="input_ids", dict_key_y="labels"):
            super().__init__(model, likelihood, last_layer, dict_key_x=dict_key_x, dict_key_y=dict_key_y)

    class NoDiagonal(CurvatureInterface):
        def full(self, x, y, **kwargs):
            raise NotImplementedError

    for backend, message in (
        (NativeHessian, "NativeHessian has no 'diag' curvature, so it cannot be the backend of a DiagSubnetLaplace"),
        (NoDiagonal, "NoDiagonal has no 'diag' curvature"),
        (NoSubnetwork, "NoSubnetwork takes no subnetwork_indices"),
    ):
        with pytest.raises(ValueError, match=message):
            subnet(mlp(), "classification", "diag", ORDER, backend=backend)
    subnet(mlp(), "classification", "full", ORDER, backend=NativeHessian)
