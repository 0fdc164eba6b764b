"""Float32 models whose curvature is far larger than the prior: posteriors and evidence have the digits of float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature.curvature import GGNInterface

from . import naive
from .models import CASES, loader
from .posteriors import SIX


def weak_prior(dtype, prior, backend=None):
    """A network whose curvature is 1e10 times the prior precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 1))
    x, y, new = 10 * torch.randn(120, 20), torch.randn(120, 1), 10 * torch.randn(30, 20)
    la = Laplace(model.to(dtype), "regression", "all", "full", sigma_noise=0.1, prior_precision=prior, backend=backend)
    la.fit(loader(x.to(dtype), y.to(dtype), batch_size=40))
    return la, x.to(dtype), new.to(dtype)


def dense_truth(la, x, new):
    """Log determinant ratio and variances in float64, from ``det(I + J Jᵀ h / p)`` and a dense inverse."""
    js, js_new = naive.jacobians(la.model, x)[:, 0], naive.jacobians(la.model, new)
    gram = js @ js.T * 100 / 1e-4
    precision = 100 * js.T @ js + 1e-4 * torch.eye(js.shape[1], dtype=torch.float64)
    ratio = torch.logdet(gram + torch.eye(len(gram), dtype=torch.float64))
    return ratio, naive.glm_covariance(js_new, precision)


@pytest.mark.parametrize("prior", [1e-4, torch.full((6,), 1e-4)], ids=["scalar", "layerwise"])
def test_a_float32_model_has_the_float64_posterior_under_a_weak_prior(prior):
    exact, x, new = weak_prior(torch.float64, 1e-4)
    ratio, variance = dense_truth(exact, x, new)
    la, _, new = weak_prior(torch.float32, prior)
    assert la.log_det_ratio.item() == pytest.approx(ratio.item(), rel=1e-6)
    assert naive.relative_error(la(new)[1].double(), variance) < 1e-5
    js = la.backend.jacobians(new)[0]
    assert naive.relative_error(la.functional_variance(js).double(), variance) < 1e-5
    joint = la.functional_covariance(js.flatten(0, 1)).diagonal()
    assert naive.relative_error(joint.double(), variance.flatten()) < 1e-5


def test_a_backend_that_rounds_more_than_the_prior_says_so():
    la, _, _ = weak_prior(torch.float32, 1e-4, GGNInterface)
    with pytest.warns(
        UserWarning, match="GGNInterface adds up curvature in float32, with rounding of about .* model.double"
    ):
        _ = la.log_det_ratio


@pytest.mark.parametrize("subset, structure", SIX)
def test_evidence_is_float64(subset, structure):
    """At a loss of 3e6, float32 has no digit for a prior precision of 1.02 instead of 1."""
    model, x, y = CASES["mlp"].make(dtype=torch.float32)
    la = Laplace(model, "classification", subset, structure)
    la.fit(loader(x, y))
    la.loss = la.loss + 3e6
    values = [la.log_marginal_likelihood(torch.tensor([p])) for p in (1.0, 1.02)]
    assert values[0].dtype is torch.float64
    model.double()
    exact = Laplace(model, "classification", subset, structure)
    exact.fit(loader(x.double(), y))
    truth = [exact.log_marginal_likelihood(torch.tensor([p])) for p in (1.0, 1.02)]
    assert float(values[1] - values[0]) == pytest.approx(float(truth[1] - truth[0]), rel=1e-3)
