"""Predictives with ``enable_backprop`` pass gradients to the inputs: finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from laplace import Laplace
from laplace.curvature import NativeGGN
from tests.core import naive
from tests.core.models import CASES, Case, loader, mlp

POSTERIORS = [
    *[("all", structure) for structure in ("full", "kron", "ekfac", "diag", "blockdiag")],
    *[("last_layer", structure) for structure in ("full", "kron", "diag")],
    *[("subnetwork", structure) for structure in ("full", "diag")],
]
SHARED = [
    {},
    {"diagonal_output": True},
    {"pred_type": "nn", "link_approx": "mc", "n_samples": 3},
]
OPTIONS = {
    "regression": [*SHARED, {"joint": True}],
    "classification": [
        *SHARED,
        *[{"link_approx": link, "n_samples": 3} for link in ("mc", "bridge", "bridge_norm")],
        {"link_approx": "mc", "n_samples": 3, "diagonal_output": True},
    ],
}


def fitted(likelihood, subset, structure, enable_backprop=True):
    torch.manual_seed(0)
    model = mlp(outputs=2).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(6, 2, dtype=torch.float64) if likelihood == "regression" else torch.arange(6) % 2
    chosen = {"subnetwork_indices": torch.tensor([0, 3, 14, 17, 20])} if subset == "subnetwork" else {}
    la = Laplace(model, likelihood, subset, structure, enable_backprop=enable_backprop, **chosen)
    la.fit(loader(x, y))
    return la, torch.randn(3, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("likelihood", OPTIONS)
@pytest.mark.parametrize("subset, structure", POSTERIORS)
def test_predictives_differentiate(subset, structure, likelihood):
    la, x = fitted(likelihood, subset, structure)
    for options in OPTIONS[likelihood]:
        assert gradcheck(lambda z, o=options: la(z, generator=torch.Generator().manual_seed(0), **o), (x,)), options


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("likelihood", OPTIONS)
@pytest.mark.parametrize("subset, structure", POSTERIORS)
def test_predictive_samples_differentiate(subset, structure, likelihood, pred_type):
    la, x = fitted(likelihood, subset, structure)

    def draw(z):
        return la.predictive_samples(z, pred_type, n_samples=2, generator=torch.Generator().manual_seed(0))

    assert gradcheck(draw, (x,))


@pytest.mark.parametrize("likelihood", OPTIONS)
@pytest.mark.parametrize("subset, structure", POSTERIORS)
def test_values_are_those_without_gradients(subset, structure, likelihood):
    with_graph, x = fitted(likelihood, subset, structure)
    without, _ = fitted(likelihood, subset, structure, enable_backprop=False)
    ours, theirs = with_graph(x), without(x)
    for one, two in zip(ours, theirs, strict=True) if likelihood == "regression" else [(ours, theirs)]:
        assert one.requires_grad and not two.requires_grad
        torch.testing.assert_close(one.detach(), two)


@pytest.mark.parametrize("name", ["sequence-output", "sequence-regression", "scalar"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_outputs_with_positions_have_the_shapes_of_those_without_gradients(name, subset):
    case = CASES[name]
    model, x, y = case.make()
    both = []
    for graph in (True, False):
        la = Laplace(model, case.likelihood, subset, "full", enable_backprop=graph)
        la.fit(loader(x, y))
        other = {"diagonal_output": True} if case.likelihood == "classification" else {"joint": True}
        found = [la(x), la(x, **other)]
        both.append([part.detach() for value in found for part in (value if isinstance(value, tuple) else (value,))])
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two)


class FunctionalNorm(nn.Module):
    """Layer norm by function, with affine parameters of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]))

    def forward(self, x):
        return self.last(torch.tanh(F.layer_norm(self.first(x), (4,), self.scale)))


NETWORKS = {name: case for name, case in CASES.items() if not case.vocabulary}
NETWORKS["functional-norm"] = Case(FunctionalNorm)


class Attention(nn.Module):
    """Attention by the kernel of torch's choice, and an encoder layer, which is one operation where there are no gradients."""

    def __init__(self):
        super().__init__()
        self.query, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)

    def forward(self, x):
        return self.last(F.scaled_dot_product_attention(self.query(x), x, x).mean(1) + self.encoder(x).mean(1))


NETWORKS["attention"] = Case(Attention, (3, 4), (2,))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_differentiates(name):
    """Jacobians and outputs, so that whatever is made of them is right; layer norm is not right in ``torch.func``."""
    model, x, _ = NETWORKS[name].make()
    backend = NativeGGN(model, NETWORKS[name].likelihood)
    x = x[:2].clone().requires_grad_(True)
    assert naive.relative_error(backend.jacobians(x, True)[0].detach(), naive.jacobians(model, x)) < 1e-10
    assert gradcheck(lambda z: backend.jacobians(z, enable_backprop=True), (x,), fast_mode=True)


@pytest.mark.parametrize("name", ["stride-padding", "normed", "functional-norm", "tied", "sequence", "attention"])
def test_predictives_of_other_networks_differentiate(name):
    model, x, y = NETWORKS[name].make()
    la = Laplace(model, NETWORKS[name].likelihood, "all", "diag", enable_backprop=True)
    la.fit(loader(x, y))
    x = x[:2].clone().requires_grad_(True)
    assert gradcheck(la, (x,))
    la(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_layer_norm_in_dict_like_batches():
    model, x, _ = CASES["normed"].make()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, data):
            return self.net(data["x"])

    expected, _ = NativeGGN(model, "classification").jacobians(x)
    js, f = NativeGGN(Wrapped(), "classification").jacobians({"x": x}, enable_backprop=True)
    torch.testing.assert_close(js.detach(), expected)
    torch.testing.assert_close(f.detach(), model(x).detach())


def test_singular_covariances_have_samples_with_gradients():
    """One parameter, two outputs: the covariance of the outputs has rank one."""
    torch.manual_seed(0)
    model = mlp(outputs=2)  # float32: rounding may make the singular covariance indefinite
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    indices = torch.tensor([0])
    la = Laplace(model, "regression", "subnetwork", "full", subnetwork_indices=indices, enable_backprop=True)
    la.fit(loader(x, y))
    z = torch.randn(50, 3, requires_grad=True)
    samples = la.predictive_samples(z, n_samples=4)
    (gradient,) = torch.autograd.grad(samples.sum(), z)
    assert bool(torch.isfinite(gradient).all())


def test_acquisition_by_gradient_ascent():
    """What it is for: walk uphill on the predictive standard deviation, as Bayesian optimisation does."""
    la, x = fitted("regression", "all", "kron")
    optimizer = torch.optim.Adam([x], lr=0.05)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        deviation = la(x)[1].diagonal(dim1=1, dim2=2).sqrt().sum()
        (-deviation).backward()
        optimizer.step()
        values.append(deviation.item())
    assert values[-1] > 1.05 * values[0]
    assert all(p.grad is None for p in la.model.parameters())
