"""Models in bfloat16 and float16 against the same weights in float64: curvature, variances, low rank, samples."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace

from . import naive
from .test_uses import Function, P

TYPES = [torch.bfloat16, torch.float16]
STRUCTURES = ["full", "diag", "kron", "ekfac", "blockdiag", "lowrank", "gp"]


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )


def of_functions():
    run = lambda m, x: ((x * m.s + m.b) @ m.w).tanh() @ m.v  # noqa: E731
    return Function(run, s=P(6), b=P(6), w=P(6, 8), v=P(8, 2))


def by_copies():
    return Function(lambda m, x: (x @ m.w.exp().softmax(0)).tanh() @ m.v, w=P(6, 8), v=P(8, 2))


MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 2)), (6,)),
    "convolutions": (convolutional, (3, 6, 6)),
    "functions": (of_functions, (6,)),
    "copies": (by_copies, (6,)),
    "recurrent": (
        lambda: Function(lambda m, x: m.h(m.g(x)[0].mean(1)), g=nn.GRU(6, 4, batch_first=True), h=nn.Linear(4, 2)),
        (3, 6),
    ),
}


def made(name, kind, n=20):
    """A model and its data in half precision, and the same numbers in float64."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    low = make().to(kind).eval()
    x, y = torch.randn(n, *shape).to(kind), torch.randn(n, 2).to(kind)
    return (low, x, y), (copy.deepcopy(low).double(), x.double(), y.double())


def rounding(low, precise):
    """Relative error of the model's own outputs and Jacobians, and one spacing of its numbers."""
    (model, x, _), (truth, doubled, _) = low, precise
    js = torch.stack([gradients(model, x[i : i + 1]) for i in range(len(x))])
    errors = (
        naive.relative_error(model(x).detach(), truth(doubled).detach()),
        naive.relative_error(js, naive.jacobians(truth, doubled)),
    )
    return max(*errors, torch.finfo(x.dtype).eps)


def gradients(model, x):
    rows = []
    for value in model(x)[0]:
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(rows)


def fitted(case, structure, **options):
    model, x, y = case
    la = Laplace(model, "regression", "all", structure, sigma_noise=0.5, **options)
    la.fit([(x[:11], y[:11]), (x[11:], y[11:])])
    return la


@pytest.mark.parametrize("prior", [1.0, 1e4])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", TYPES)
def test_variances_have_the_digits_of_the_model(kind, name, structure, prior):
    low, precise = made(name, kind)
    la, truth = (fitted(case, structure, prior_precision=prior) for case in (low, precise))
    variance, expected = la(low[1])[1], truth(precise[1])[1]
    assert variance.dtype is torch.float32
    assert naive.relative_error(variance, expected) < 4 * rounding(low, precise)
    evidence, exact = la.log_marginal_likelihood(), truth.log_marginal_likelihood()
    assert naive.relative_error(evidence, exact) < 4 * rounding(low, precise)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_variances_of_jacobians_in_half_precision_are_in_single(structure):
    low, precise = made("perceptron", torch.bfloat16)
    la, truth = (fitted(case, structure) for case in (low, precise))
    js = naive.jacobians(precise[0], precise[1])
    variance, expected = la.functional_variance(js.bfloat16()), truth.functional_variance(js)
    assert variance.dtype is torch.float32 and naive.relative_error(variance, expected) < 0.05
    joint = la.functional_covariance(js.flatten(0, 1).bfloat16())
    assert joint.dtype is torch.float32
    assert naive.relative_error(joint, truth.functional_covariance(js.flatten(0, 1))) < 0.05


def test_eigenpairs_are_those_of_the_model_in_single_precision():
    """Products in bfloat16 left eigenvalues a tenth and more from their values, without a word."""
    low, precise = made("perceptron", torch.bfloat16)
    single = tuple(copy.deepcopy(part).float() for part in low)
    ours, theirs = fitted(low, "lowrank").H, fitted(single, "lowrank").H
    assert naive.relative_error(ours[1], theirs[1]) < 1e-5
    assert naive.relative_error(ours[1], fitted(precise, "lowrank").H[1]) < 1e-5


def test_a_model_that_insists_on_half_precision_has_no_eigenpairs():
    model = Function(lambda m, x: m.head(x.bfloat16()), head=nn.Linear(3, 2)).bfloat16()
    x = torch.randn(5, 3)
    la = Laplace(model, "regression", "all", "lowrank")
    with pytest.raises(ValueError, match="does not run with weights and inputs in float32.*model.float()"):
        la.fit([(x, torch.zeros(5, 2).bfloat16())])


def test_samples_that_the_weights_cannot_hold_are_said():
    low, _ = made("perceptron", torch.bfloat16)
    for prior, said in ((1.0, False), (1e6, True)):
        la = fitted(low, "diag", prior_precision=prior)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            la(low[1], pred_type="nn", link_approx="mc", n_samples=5)
        assert any("rounded to bfloat16" in str(w.message) for w in caught) == said


class OfTwoTypes(nn.Module):
    """A body of one type under a head of another, as a large model in half precision has a new head or adapters in float32."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6).to(body), nn.Linear(6, 3).to(head)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.to(self.body.weight))).to(self.head.weight))


@pytest.mark.filterwarnings("ignore:Samples of the weights are rounded")
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize(
    "subset, structure", [("all", s) for s in ("full", "diag", "kron", "ekfac", "gp")] + [("last_layer", "kron")]
)
def test_a_model_of_two_types_is_fitted_sampled_saved_and_goes_on(types, subset, structure):
    torch.manual_seed(0)
    model, x, y = OfTwoTypes(*types), torch.randn(12, 4), torch.arange(12) % 3
    la, again = (Laplace(model, "classification", subset, structure) for _ in range(2))
    la.fit([(x, y)])
    exact = Laplace(OfTwoTypes(torch.float64, torch.float64), "classification", subset, structure)
    exact.backend.model.load_state_dict(la.backend.model.state_dict())
    exact.fit([(x, y)])
    assert naive.relative_error(la(x).double(), exact(x)) < (0.02 if torch.bfloat16 in types else 1e-5)
    again.load_state_dict(la.state_dict())
    assert torch.equal(again(x), la(x))
    if structure != "gp":
        draws = la(x, pred_type="nn", link_approx="mc", n_samples=200, generator=torch.Generator().manual_seed(0))
        other = exact(x, pred_type="nn", link_approx="mc", n_samples=200, generator=torch.Generator().manual_seed(1))
        assert float((draws - other).abs().max()) < 0.2  # 200 draws of probabilities, in both
        again.fit([(x, y)], override=False)
        assert again.n_data == 24


class Activated(nn.BatchNorm2d):
    """A normalisation with an activation inside, as image models have them: its output is not that of its base class."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_layer_that_does_more_than_its_base_class_is_noticed_among_many_positions(precision):
    """Terms of a thousand positions cancel: what is wrong about their sum is small next to their absolute values."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Activated(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 784, 3)
    ).eval()
    x, y = torch.randn(6, 3, 32, 32), torch.randint(3, (6,))
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        la = Laplace(model, "classification", "all", "diag")
        la.fit([(x, y)])
    reasons = {name: reason for name, _, reason in la.coverage}
    assert "uses in the graph" in reasons["1.weight"] and "uses in the graph" in reasons["1.bias"]
    assert reasons["0.weight"] == "Conv2d"
    exact = Laplace(model.double(), "classification", "all", "diag")
    exact.fit([(x.double(), y)])
    for name in ("1.weight/diag", "1.bias/diag"):
        error = (la.sums.tensors[name] - exact.sums.tensors[name]).norm() / exact.sums.tensors[name].norm()
        assert error < (1e-4 if precision is torch.float32 else 0.1)
