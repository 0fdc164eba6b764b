"""The ASDL backends: equal to the native sums where they take a model, a ValueError that names a way out where not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import asdfghjkl, backend_class
from laplace.curvature.asdl import AsdlEF, AsdlGGN, AsdlHessian, AsdlInterface
from laplace.curvature.conformance import SumsConformance
from laplace.errors import NonFiniteError

from . import naive
from .models import CASES, Case, loader, mlp

TOLERANCE = 1e-9
STRUCTURES = ("full", "kron", "diag")
PLAIN = "ASDL takes convolutions without groups and dilation"
NO_FACTORS = "ASDL has no Kronecker factors for .*Use the native backend"
WRONG_ROWS = "ASDL's per-example gradients of .* are not its gradients"
# What it refuses, by model and structure; everything else has to agree with the native backend.
REFUSED = {
    **{(name, s): PLAIN for name in ("same-dilation", "reflect", "circular-same") for s in STRUCTURES},
    **{("grouped", s): PLAIN for s in ("full", "diag")},
    **{(name, "kron"): NO_FACTORS for name in ("grouped", "tied", "used-outside", "normed", "embedding", "scalar")},
    ("inplace-residual-fallback", "kron"): NO_FACTORS,
    **{(name, s): WRONG_ROWS for name in ("twice", "used-outside") for s in ("full", "diag")},
    ("twice", "kron"): "Layer 'shared' runs 2 times.*Use the native backend",
    **{("scalar", s): r"no per-example gradients for 'gate' \(Gated\)" for s in ("full", "diag")},
    **{("embedding", s): r"no per-example gradients for 'table.weight' \(Embedding\)" for s in ("full", "diag")},
}


def fit(case, structure, backend, subset="all", n=5, **kwargs):
    model, x, y = case.make(n=n)
    cls, options = backend_class(*backend)
    la = Laplace(model, case.likelihood, subset, structure, backend=cls, backend_kwargs={**options, **kwargs})
    la.fit(loader(x, y, 2))
    return la


def check_equal_sums(one, two, tolerance=TOLERANCE):
    assert one.sums.spec == two.sums.spec
    assert one.n_data == two.n_data
    for name, value in two.sums.to_tensors().items():
        assert naive.relative_error(one.sums.to_tensors()[name], value) < tolerance, name


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_equals_native_or_names_the_alternative(name, structure, estimator):
    case = CASES[name]
    if (name, structure) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, structure]):
            fit(case, structure, ("asdl", estimator))
    else:
        check_equal_sums(fit(case, structure, ("asdl", estimator)), fit(case, structure, ("native", estimator)))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("estimator", ["ggn", "ef", "mc"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "no-bias", "stride-padding", "twice", "embedding"])
def test_last_layer_equals_native(name, structure, estimator, likelihood):
    base = CASES[name]
    case = Case(base.build, base.shape, base.outputs, likelihood, vocabulary=base.vocabulary)
    kwargs = {"seed": 3, "num_samples": 2} if estimator == "mc" else {}
    one = fit(case, structure, ("asdl", estimator), "last_layer", **kwargs)
    check_equal_sums(one, fit(case, structure, ("native", estimator), "last_layer", **kwargs))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "regression", "stride-padding", "sequence"])
def test_monte_carlo_draws_are_the_native_ones(name, structure):
    """Which also checks the scale of several samples: ASDL's own would be too small by their number."""
    kwargs = {"seed": 11, "num_samples": 3}
    one = fit(CASES[name], structure, ("asdl", "mc"), **kwargs)
    check_equal_sums(one, fit(CASES[name], structure, ("native", "mc"), **kwargs))


@pytest.mark.parametrize("name", ["mlp", "stride-padding", "sequence", "tied", "normed", "frozen", "sequence-output"])
def test_jacobians_and_gradients_equal_naive(name):
    case = CASES[name]
    model, x, y = case.make()
    backend = AsdlGGN(model, case.likelihood)
    expected = naive.jacobians(model, x)
    js, f = backend.jacobians(x)
    assert naive.relative_error(js, expected) < TOLERANCE
    assert naive.relative_error(f, model(x).detach()) < TOLERANCE
    gradients, loss = backend.gradients(x, y)
    truth = [naive.example_gradient(model, a, b, case.likelihood) for a, b in zip(x, y, strict=True)]
    assert naive.relative_error(gradients, torch.stack(truth)) < TOLERANCE
    assert float(loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)))


def test_jacobians_let_gradients_through_to_the_inputs():
    model, x, _ = CASES["mlp"].make()
    x.requires_grad_()
    js, _ = AsdlGGN(model, "classification").jacobians(x, enable_backprop=True)
    (gradient,) = torch.autograd.grad(js.square().sum(), x)
    assert gradient.shape == x.shape
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_kron_full_and_diag_of_one_batch_keep_the_conventions(structure):
    """Input factors divided by N; a subnetwork's indices restrict dense curvature."""
    model, x, y = CASES["stride-padding"].make()
    backend = AsdlGGN(model, "classification")
    if structure == "kron":
        ours = backend.kron(x, y, N=20)[1].kfacs
        expected = naive.kron(model, x, y, "classification", "ggn")
        assert [len(fs) for fs in ours] == [2, 1, 2, 1]
        for (left, *right), (b, *a) in zip(ours, expected, strict=True):
            assert naive.relative_error(left, b) < TOLERANCE
            assert not right or naive.relative_error(right[0], a[0] * len(y) / 20) < TOLERANCE
        return
    indices = torch.tensor([0, 5, 9, 30])
    expected = naive.full(model, x, y, "classification", "ggn")[indices][:, indices]
    backend = AsdlGGN(model, "classification", subnetwork_indices=indices)
    ours = getattr(backend, structure)(x, y)[1]
    assert naive.relative_error(ours, expected if structure == "full" else expected.diagonal()) < TOLERANCE


class PositionsFirst(nn.Module):
    """Its inner layer sees (positions, batch, width)."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("positions", [2, 5])
def test_layers_whose_first_dimension_is_not_the_batch_are_refused(positions, structure):
    """Sums of such rows are right, single rows are not."""
    with pytest.raises(ValueError, match="batch dimension first|no Kronecker factors for"):
        model, x, y = Case(PositionsFirst, (positions, 3)).make()
        cls, _ = backend_class("asdl")
        if structure == "kron" and positions == 5:
            x, y = x[:4], y[:4]
        getattr(cls(model, "classification"), structure)(x, y, **({"N": 5} if structure == "kron" else {}))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_model_is_left_as_found(subset, estimator, structure):
    model, x, y = CASES["inplace-relu"].make()
    model.train()
    before = {name: (p, p.clone(), dict(p.__dict__)) for name, p in model.named_parameters()}
    state = [{k: v for k, v in vars(m).items() if "hook" in k or not k.startswith("_")} for m in model.modules()]
    state = [{k: v.copy() if isinstance(v, dict) else v for k, v in s.items()} for s in state]
    la = Laplace(model, "classification", subset, structure, backend=backend_class("asdl", estimator)[0])
    la.fit(loader(x, y))
    la.backend.jacobians(x)
    la.backend.gradients(x, y)
    now = [{k: v for k, v in vars(m).items() if "hook" in k or not k.startswith("_")} for m in model.modules()]
    assert now == state
    for name, p in model.named_parameters():
        same, value, attributes = before[name]
        assert p is same
        assert torch.equal(p, value)
        assert p.__dict__ == attributes
        assert p.grad is None
        assert p.requires_grad


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, y: x[3].fill_(torch.nan), NonFiniteError, "indices 3"),
        (lambda x, y: y[4].fill_(7), ValueError, "Label 7 of example 4 is out of range"),
    ],
    ids=["nan", "label"],
)
def test_bad_examples_are_named_by_global_index(change, error, message, structure):
    model, x, y = CASES["mlp"].make()
    change(x, y)
    la = Laplace(model, "classification", "all", structure, backend=AsdlGGN)
    with pytest.raises(error, match=message):
        la.fit(loader(x, y))
    assert all(p.requires_grad for p in model.parameters())


def test_warnings_of_its_hooks_stay_inside():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(CASES["sequence"], "kron", ("asdl", "ggn"))
        fit(CASES["sequence"], "diag", ("asdl", "ggn"))


def test_fisher_settings_under_asdls_names():
    model, x, y = CASES["mlp"].make()
    kwargs = {"backend": AsdlGGN, "backend_kwargs": {"stochastic": True}}
    la = Laplace(model, "classification", "all", "kron", asdl_fisher_kwargs={"n_mc_samples": 3, "seed": 11}, **kwargs)
    la.fit(loader(x, y))
    check_equal_sums(la, fit(CASES["mlp"], "kron", ("native", "mc"), seed=11, num_samples=3))
    la = Laplace(model, "classification", asdl_fisher_kwargs={"fisher_type": "x"}, **kwargs)
    with pytest.raises(ValueError, match="'fisher_type'; valid are 'n_mc_samples', 'seed'"):
        la.fit(loader(x, y))
    with pytest.raises(ValueError, match="asdl_fisher_kwargs are for backend=AsdlGGN alone"):
        Laplace(model, "classification", asdl_fisher_kwargs={"seed": 1}).fit(loader(x, y))


def test_names_and_loss_types():
    model = mlp()
    assert AsdlGGN(model, "regression").loss_type == "mse"
    assert AsdlEF(model, "classification").loss_type == "cross_entropy"
    assert issubclass(asdfghjkl.AsdfghjklGGN, AsdlGGN)
    assert issubclass(asdfghjkl.AsdfghjklEF, AsdlEF)
    assert issubclass(asdfghjkl.AsdfghjklHessian, AsdlHessian)
    assert all(issubclass(getattr(asdfghjkl, name), AsdlInterface) for name in asdfghjkl.__all__)


@pytest.mark.parametrize("cls", [asdfghjkl.AsdfghjklGGN, asdfghjkl.AsdfghjklEF])
def test_the_older_names_compute_the_same(cls):
    model, x, y = CASES["regression"].make()
    estimator = "ef" if cls is asdfghjkl.AsdfghjklEF else "ggn"
    la = Laplace(model, "regression", "all", "kron", backend=cls)
    la.fit(loader(x, y))
    check_equal_sums(la, fit(CASES["regression"], "kron", ("native", estimator)))


class TestConformanceMonteCarlo(SumsConformance):
    backend = AsdlGGN
    backend_kwargs = {"stochastic": True, "seed": 5, "num_samples": 2}


class TestConformanceEmpirical(SumsConformance):
    backend = AsdlEF
    likelihood = "regression"
    hessian_structure = "full"
