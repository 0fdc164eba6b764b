"""Some of the outputs: the exact curvature of these, and their variances, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace
from laplace.errors import NotFittedError
from laplace.predictive import glm_distribution

from . import naive


class Tagger(nn.Module):
    """Three positions with five classes each."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def plain(outputs=5):
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs))


def case(name):
    torch.manual_seed(0)
    if name == "positions":
        return Tagger().double().eval(), torch.randn(7, 3, 2).double(), torch.randint(5, (7, 3)), "classification"
    if name == "regression":
        return plain().double().eval(), torch.randn(7, 4).double(), torch.randn(7, 5).double(), "regression"
    return plain().double().eval(), torch.randn(7, 4).double(), torch.randint(5, (7,)), "classification"


def fitted(model, x, y, likelihood, structure="full", subset="all", **kwargs):
    la = Laplace(model, likelihood, subset, structure, backend_kwargs=kwargs)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    return la


def truth(model, x, likelihood, chosen):
    """``Σ J_Sᵀ Λ_SS J_S`` with every matrix formed; positions are independent terms."""
    js, f = naive.jacobians(model, x), model(x).detach()
    f = f.reshape(len(x), -1, f.shape[-1])
    total = torch.zeros(js.shape[-1], js.shape[-1], dtype=torch.float64)
    for n in range(len(x)):
        for t in range(f.shape[1]):
            p = f[n, t].softmax(-1)
            hessian = torch.eye(5).double() if likelihood == "regression" else p.diag() - torch.outer(p, p)
            j = js[n].reshape(f.shape[1], f.shape[2], -1)[t][chosen]
            total += j.T @ hessian[chosen][:, chosen] @ j
    return total


@pytest.mark.parametrize("name", ["classification", "positions", "regression"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_curvature_of_chosen_outputs_holds_the_others_constant(name, structure):
    model, x, y, likelihood = case(name)
    la = fitted(model, x, y, likelihood, structure, outputs=[4, 1])
    h = truth(model, x, likelihood, [1, 4])
    assert naive.relative_error(la.H, h if structure == "full" else h.diagonal()) < 1e-10


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_all_outputs_chosen_are_the_exact_curvature(structure, subset):
    model, x, y, likelihood = case("classification")
    exact, chosen = (fitted(model, x, y, likelihood, structure, subset, **k) for k in ({}, {"outputs": range(5)}))
    for name, value in exact.sums.to_tensors().items():
        assert naive.relative_error(chosen.sums.to_tensors()[name], value) < 1e-10


def test_kronecker_factors_of_one_output_are_those_of_its_gradient():
    model, x, y, likelihood = case("classification")
    la = fitted(model, x, y, likelihood, "kron", outputs=[2])
    p = model(x).detach().softmax(-1)[:, 2]
    g = (p * (1 - p)).sqrt()[:, None] * model[2].weight[2] * (1 - model[:2](x).square())  # through the tanh
    assert naive.relative_error(la.sums.to_tensors()["0.weight/B"], (g.T @ g).detach()) < 1e-10


def test_backward_passes_are_as_many_as_outputs_are_chosen(monkeypatch):
    from laplace.capture.capture import Capture

    seen, before = [], Capture.gradients
    monkeypatch.setattr(Capture, "gradients", lambda self, v: seen.append(1) or before(self, v))
    model, x, y, likelihood = case("classification")
    la = fitted(model, x, y, likelihood, "kron", outputs=[0, 3])
    assert len(seen) == 2 * 2  # batches, outputs
    seen.clear()
    la.output_variances(x, [1])
    assert len(seen) == 1


def test_sums_of_other_outputs_are_not_added_to_these():
    model, x, y, likelihood = case("classification")
    la = fitted(model, x, y, likelihood, "diag", outputs=[0])
    assert la.sums.estimator == "ggn of outputs 0"
    la.backend.outputs = (1,)
    with pytest.raises(ValueError, match="ggn of outputs 0.*ggn of outputs 1"):
        la.fit(DataLoader(TensorDataset(x, y), batch_size=4), override=False)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"outputs": []}, "one at least"),
        ({"outputs": [1, 1]}, "distinct"),
        ({"outputs": [-1]}, "from 0 on"),
        ({"outputs": [1], "stochastic": True}, "leave it or stochastic=True out"),
        ({"outputs": [9]}, "the model has 5 outputs"),
    ],
)
def test_a_choice_that_is_none_is_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        fitted(*case("classification"), "diag", **kwargs)


@pytest.mark.parametrize("name", ["classification", "positions", "regression"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_variances_of_chosen_outputs_are_those_of_all(structure, subset, name):
    model, x, y, likelihood = case(name)
    la = fitted(model, x, y, likelihood, structure, subset)
    f, variance = glm_distribution(la, x, diagonal=True)
    mean, some = la.output_variances(x, [4, 0])
    assert naive.relative_error(some, variance.flatten(1)[:, [4, 0]]) < 1e-10
    assert torch.equal(mean, f.flatten(1)[:, [4, 0]])


def test_variances_asked_for_wrongly_are_refused():
    model, x, y, likelihood = case("classification")
    la = fitted(model, x, y, likelihood, "kron")
    for outputs, says in (([5], "5 is not in 0…4"), ([], "one at least"), ([2, 2], "distinct")):
        with pytest.raises(ValueError, match=says):
            la.output_variances(x, outputs)
    with pytest.raises(NotFittedError):
        Laplace(model, likelihood, "all", "kron").output_variances(x, [0])
