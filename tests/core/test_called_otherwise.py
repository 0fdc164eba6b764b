"""Subclasses of torch's layers that are called with, or give, something else than one tensor by position."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace import Laplace, curvature

from .test_uses import Function


class ByName(nn.Linear):
    def forward(self, hidden):
        return F.linear(hidden, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, scale, x):
        return F.linear(scale * x, self.weight, self.bias)


class WithBias(nn.Linear):
    """As the layers of model-parallel libraries, which leave the addition to others."""

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class Named(nn.Linear):
    def forward(self, x):
        return {"y": F.linear(x, self.weight, self.bias)}


class OfADictionary(nn.Linear):
    def forward(self, batch):
        return F.linear(batch["x"], self.weight, self.bias)


LAYERS = {  # class, and how it is called
    "another name": (ByName, lambda layer, x: layer(hidden=x)),
    "by keyword": (nn.Linear, lambda layer, x: layer(input=x)),
    "two inputs": (Scaled, lambda layer, x: layer(torch.ones((), dtype=x.dtype), x)),
    "the second by name": (Scaled, lambda layer, x: layer(torch.ones((), dtype=x.dtype), x=x)),
    "a tuple": (WithBias, lambda layer, x: operator.add(*layer(x))),
    "a dictionary": (Named, lambda layer, x: layer(x)["y"]),
    "of a dictionary": (OfADictionary, lambda layer, x: layer({"x": x})),
}
X, Y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


def model(kind, call, last=False):
    torch.manual_seed(0)
    inner, head = (nn.Linear if last else kind)(3, 4), (kind if last else nn.Linear)(4, 2)
    run = (lambda m, x: call(m.head, m.inner(x).tanh())) if last else (lambda m, x: m.head(call(m.inner, x).tanh()))
    return Function(run, inner=inner, head=head).double().eval()


def fitted(network, structure, subset, backend="NativeGGN"):
    la = Laplace(network, "regression", subset, structure, backend=getattr(curvature, backend))
    la.fit([(X, Y)])
    return la


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_layer_that_it_is(name, last, structure):
    la = fitted(model(*LAYERS[name], last), structure, "all")
    other = fitted(model(nn.Linear, lambda layer, x: layer(x), last), structure, "all")
    one, two = (p.H.to_matrix() if structure == "kron" else p.H for p in (la, other))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(la(X)[1], other(X)[1])


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_last_layer_is_right_or_refused_by_name(name, structure):
    network = model(*LAYERS[name], last=True)
    if name not in ("another name", "by keyword"):
        with pytest.raises(ValueError, match=r"'head' \(.*\) is called with something else than one tensor, or gives"):
            fitted(network, structure, "last_layer")
        return
    la = fitted(network, structure, "last_layer")
    other = fitted(model(nn.Linear, lambda layer, x: layer(x), last=True), structure, "last_layer")
    torch.testing.assert_close(la(X)[1], other(X)[1])


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("backend", ["CurvlinopsGGN", "AsdlGGN"])
@pytest.mark.parametrize("name", LAYERS)
def test_packages_are_right_or_say_so(name, backend, structure):
    try:
        la = fitted(model(*LAYERS[name]), structure, "all", backend)
    except ValueError as error:
        assert "Use the native backend" in str(error)
        return
    other = fitted(model(nn.Linear, lambda layer, x: layer(x)), structure, "all", backend)
    torch.testing.assert_close(la(X)[1], other(X)[1])


class Doubled(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def with_backward_hook():
    layer = nn.Linear(4, 2)
    layer.register_full_backward_pre_hook(lambda module, gradients: tuple(2 * g for g in gradients))
    return layer


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac"])
@pytest.mark.parametrize("make", [lambda: Doubled(4, 2), with_backward_hook])
def test_a_last_layer_that_is_called_with_more_than_its_product(make, structure):
    """What automatic differentiation gives counts, as for all weights; the product alone had a quarter of the curvature."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), make()).double()
    one = fitted(network, structure, "last_layer")
    other = fitted(network, "diag" if structure in ("kron", "ekfac") else structure, "all")
    wanted = other.H[-10:, -10:] if structure == "full" else other.H[-10:]
    found = one.H.to_matrix().diagonal() if structure == "kron" else one.H
    if structure != "ekfac":
        torch.testing.assert_close(found, wanted)
    else:
        assert {kind for _, kind, _ in one.coverage} == {"diag"}
