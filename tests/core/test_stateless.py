"""Forward passes with other tensors in place of parameters leave the model as it is, whatever names its modules have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace, curvature
from laplace.capture.stateless import with_tensors

from .naive import relative_error
from .test_uses import Function

X, Y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


def plain():
    torch.manual_seed(0)
    return Function(lambda m, x: m.head(m.inner(x).tanh()), inner=nn.Linear(3, 3), head=nn.Linear(3, 2)).double().eval()


def two_names():
    """Modules that are registered twice, as old names are kept beside new ones, and run by their second name."""
    model = plain()
    model.classifier, model.body = model.head, model.inner
    model.function = lambda m, x: m.classifier(m.body(x).tanh())
    return model


def inside():
    """One of the names is inside of another module."""
    model = plain()
    model.all = nn.Sequential(model.inner, nn.Tanh(), model.head)
    model.function = lambda m, x: m.all(x)
    return model


def tied():
    """Two modules with one weight."""
    model = plain()
    model.second = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    model.second.weight = model.inner.weight
    model.function = lambda m, x: m.head(m.second(m.inner(x).tanh()))
    return model


MODELS = {"plain": plain, "two names": two_names, "inside": inside, "tied": tied}


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "diag", "kron", "lowrank"])
@pytest.mark.parametrize("name", MODELS)
def test_a_posterior_leaves_its_model_as_it_is(name, structure, subset):
    if (structure, subset) == ("lowrank", "last_layer"):
        return
    model = MODELS[name]()
    before = {key: (p, p.detach().clone()) for key, p in model.named_parameters()}
    la = Laplace(model, "regression", subset, structure, enable_backprop=True)
    la.fit([(X, Y)])
    la(X, pred_type="nn", link_approx="mc", n_samples=3)
    la(X, joint=True)
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert all(now[key] is p and torch.equal(p, value) for key, (p, value) in before.items())


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_for_a_parameter_stands_for_it_everywhere(name):
    model = MODELS[name]()
    tensors = {key: 2 * p.detach() for key, p in model.named_parameters()}
    found = with_tensors(model, tensors, X)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(found, model(X).detach())


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_networks_of_a_module_with_two_names(structure):
    draws = []
    for name in ("plain", "two names", "inside"):
        la = Laplace(MODELS[name](), "regression", "all", structure)
        la.fit([(X, Y)])
        draws.append(la.functional_samples(X, "nn", 5, generator=torch.Generator().manual_seed(0)))
    assert relative_error(draws[1], draws[0]) < 1e-10 and relative_error(draws[2], draws[0]) < 1e-10


@pytest.mark.parametrize(
    ("backend", "structure"), [("CurvlinopsGGN", "full"), ("CurvlinopsHessian", "full"), ("AsdlGGN", "diag")]
)
@pytest.mark.parametrize("name", MODELS)
def test_other_packages_leave_it_too(name, backend, structure):
    """Some of them replace parameters as torch does."""
    model = MODELS[name]()
    before = dict(model.named_parameters())
    la = Laplace(model, "regression", "all", structure, backend=getattr(curvature, backend))
    try:
        la.fit([(X, Y)])
    except ValueError as error:
        assert "ASDL" in str(error) and name == "tied"
    assert all(before[key] is p for key, p in model.named_parameters())
    if backend == "CurvlinopsGGN":
        other = Laplace(MODELS[name](), "regression", "all", structure)
        other.fit([(X, Y)])
        torch.testing.assert_close(la.H, other.H)
