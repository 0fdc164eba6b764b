"""Closed forms of the last layer against dense references, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.backends.native import NativeEF, NativeGGN
from laplace.capture.last_layer import LastLayerCapture
from laplace.likelihoods import Categorical

from . import naive
from .models import CASES, loader


def last_layer(model):
    """Everything but the last layer frozen, for the reference over all weights."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("2."))
    return model


@pytest.mark.parametrize("case", ["mlp", "ten-classes", "regression", "no-bias"])
@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_curvature_and_variance_are_the_dense_ones(structure, prior, case):
    model, x, y = CASES[case].make(n=6)
    likelihood = CASES[case].likelihood
    la = Laplace(model, likelihood, "last_layer", structure, last_layer_name="2")
    la.fit(loader(x, y, batch_size=4))
    la.prior_precision = torch.tensor([0.7, 2.0][: la.n_layers if prior == "layerwise" else 1])
    reference = last_layer(CASES[case].make(n=6)[0])
    if structure == "kron":
        h = naive.kron_matrix(naive.kron(reference, x, y, likelihood, "ggn"))
        assert naive.relative_error(la.H_facs.to_matrix(), h) < 1e-12
    else:
        h = torch.diag(naive.full(reference, x, y, likelihood, "ggn").diagonal())
        assert naive.relative_error(la.H, h.diagonal()) < 1e-12
    js = naive.jacobians(reference, x)
    truth = naive.glm_covariance(js, h + torch.diag(la.prior_precision_diag))
    f, covariance = la._glm_predictive_distribution(x)
    assert torch.allclose(f, model(x))
    assert naive.relative_error(covariance, truth) < 1e-9
    assert naive.relative_error(la.functional_variance_fast(x)[1], truth.diagonal(dim1=1, dim2=2)) < 1e-9
    sweep = la._glm_variance(la.backend.capture(x), [torch.tensor([0.5]).double(), torch.tensor([3.0]).double()], True)
    for found, value in zip(sweep, (0.5, 3.0), strict=True):
        truth = naive.glm_covariance(js, h + value * torch.eye(len(h), dtype=torch.float64)).diagonal(dim1=1, dim2=2)
        assert naive.relative_error(found, truth) < 1e-9


@pytest.mark.parametrize("margin", [1.0, 20.0, 60.0])
def test_output_hessians_of_sure_examples_keep_their_digits(margin):
    """At a margin of 60, 1 - p is 1e-26; each entry is compared by itself."""
    f = torch.tensor([[margin, 0.0, 0.3], [0.1, -0.2, margin]], dtype=torch.float64)
    y, truth = torch.tensor([0, 1]), torch.zeros(3, 3, dtype=torch.float64)
    diagonals = []
    for logits in f.tolist():
        weights = [torch.tensor(v, dtype=torch.float64).exp() for v in logits]
        total = sum(weights)
        h = torch.tensor([[-(a / total) * (b / total) for b in weights] for a in weights], dtype=torch.float64)
        for i in range(3):
            h[i, i] = weights[i] / total * (sum(w for j, w in enumerate(weights) if j != i) / total)
        truth += h
        diagonals.append(h.diagonal())
    assert torch.allclose(Categorical().hessian_sum(f, y), truth, rtol=1e-12, atol=0)
    assert torch.allclose(Categorical().hessian_diagonal(f, y), torch.stack(diagonals), rtol=1e-12, atol=0)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_many_classes_form_no_direction(structure, monkeypatch):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 300))
    x, y = torch.randn(16, 5), torch.randint(300, (16,))
    asked = []
    gradients = LastLayerCapture.gradients
    monkeypatch.setattr(LastLayerCapture, "gradients", lambda self, v: asked.append(1) or gradients(self, v))
    la = Laplace(model, "classification", "last_layer", structure)
    la.fit([(x, y)])
    la(x)
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=5)
    assert not asked
    stochastic = Laplace(model, "classification", "last_layer", structure, backend_kwargs={"stochastic": True})
    stochastic.fit([(x, y)])
    assert len(asked) == 1


DENSE = {
    # features and outputs: one block of the sum, a sum of several blocks whose borders lie inside an output's, and wide features
    "one block": (7, 3),
    "borders inside": (50, 9),
    "wide features": (211, 2),
    "one output": (20, 1),
}


@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
@pytest.mark.parametrize("trained", ["weight and bias", "weight", "bias"])
@pytest.mark.parametrize("shape", DENSE)
def test_dense_curvature_is_that_of_the_outer_products(shape, trained, estimator, monkeypatch):
    """Σ vvᵀ ⊗ aaᵀ written out in float64, and the same digits whether outputs' Hessians are held at once or not."""
    (features, outputs), n = DENSE[shape], 5
    model = nn.Sequential(nn.Linear(3, features), nn.Tanh(), nn.Linear(features, outputs)).double()
    model[2].weight.requires_grad_(trained != "bias")
    model[2].bias.requires_grad_(trained != "weight")
    classes = outputs > 1
    x = torch.randn(n, 3, dtype=torch.float64)
    y = torch.randint(outputs, (n,)) if classes else torch.randn(n, 1, dtype=torch.float64)
    likelihood, backend = "classification" if classes else "regression", NativeEF if estimator == "ef" else NativeGGN
    kwargs = {"stochastic": True, "num_samples": 2, "seed": 3} if estimator == "mc" else {}
    la = Laplace(model, likelihood, "last_layer", "full", backend=backend, backend_kwargs=kwargs, last_layer_name="2")
    la.fit([(x, y)])
    with torch.no_grad():
        a, f = model[:2](x), model(x)
    truth = torch.zeros_like(la.H)
    for v in la.backend.directions(f, y):
        parts = {"weight": torch.einsum("no,ni->noi", v, a).flatten(1), "bias": v}
        rows = torch.cat([parts[name] for name in ("weight", "bias") if name in trained], 1)
        truth += rows.T @ rows
    assert naive.relative_error(la.H, truth) < 1e-14
    assert torch.equal(la.H, la.H.T)
    monkeypatch.setattr("laplace.structures.last_layer._ROOTS", 2 * outputs**2)
    again = Laplace(
        model, likelihood, "last_layer", "full", backend=backend, backend_kwargs=kwargs, last_layer_name="2"
    )
    again.fit([(x, y)])
    assert naive.relative_error(again.H, truth) < 1e-14
