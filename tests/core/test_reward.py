"""Bradley-Terry reward models: fitted as classifiers of pairs, predict the reward of one input as a regression."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace

from . import naive


class SimpleRewardModel(nn.Module):
    """The reference's: pairs ``(batch, 2, dim)`` to logits ``(batch, 2)``, single inputs to rewards ``(batch, 1)``."""

    def __init__(self, hidden=100):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x):
        if len(x.shape) == 3:
            return self.net(x.reshape(-1, x.shape[-1])).reshape(len(x), 2)
        return self.net(x)


def pairs(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(10, 2, 3).to(dtype), torch.randint(2, (10,))


def test_the_walk_through_of_the_reference():
    x, y = pairs()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    model = SimpleRewardModel()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    for _ in range(10):
        for xs, ys in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(xs), ys).backward()
            optimizer.step()
    model.eval()
    la = Laplace(model, likelihood="reward_modeling", subset_of_weights="all")
    la.fit(loader)
    la.optimize_prior_precision()
    mean, variance = la(torch.randn(5, 3))
    assert mean.shape == (5, 1) and variance.shape == (5, 1, 1)
    assert bool((variance > 0).all())


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_sums_are_of_pairs_and_variances_of_single_inputs(structure, batch_size):
    """The pair is one example with two positions, folded into the batch by the model."""
    x, y = pairs(torch.float64)
    torch.manual_seed(1)
    model = SimpleRewardModel(4).double()
    la = Laplace(model, "reward_modeling", "all", structure, prior_precision=0.7)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=batch_size))
    dense = naive.full(model, x, y, "classification", "ggn")
    if structure == "diag":
        h = torch.diag(dense.diagonal())
        assert naive.relative_error(la.H, dense.diagonal()) < 1e-10
    else:
        h = la.H_facs.to_matrix()
        hidden, out = model.net[0], model.net[2]
        inner = F.relu(hidden(x)).detach()
        expected = torch.einsum("npi,npj->ij", inner, inner) / 2 / 10
        assert naive.relative_error(la.H_facs.kfacs[2][1], expected) < 1e-10
        p = model(x).detach().softmax(1)
        expected = 2 * (p[:, 0] * p[:, 1]).sum().reshape(1, 1)  # both positions of diag(p) - p pᵀ
        assert naive.relative_error(la.H_facs.kfacs[3][0], expected) < 1e-10 and out.bias.numel() == 1
    new = torch.randn(5, 3, dtype=torch.float64)
    mean, variance = la(new)
    precision = h + 0.7 * torch.eye(len(h), dtype=torch.float64)
    assert torch.equal(mean, model(new).detach())
    assert naive.relative_error(variance, naive.glm_covariance(naive.jacobians(model, new), precision)) < 1e-9
    probabilities = la(x, fitting=True)
    assert probabilities.shape == (10, 2) and torch.allclose(probabilities.sum(1), torch.ones(10).double())
    draws = la.predictive_samples(new, n_samples=7)
    assert draws.shape == (7, 5, 1)
    sampled = la(new, pred_type="nn", link_approx="mc", n_samples=3)
    assert sampled[0].shape == sampled[1].shape == (5, 1)


@pytest.mark.parametrize(
    "subset, structure", [("all", "full"), ("all", "lowrank"), ("all", "gp"), ("last_layer", "full")]
)
def test_other_structures_are_refused(subset, structure):
    with pytest.raises(
        ValueError, match="reward_modeling' has no .* valid hessian_structures are 'kron' and 'ekfac' and 'diag'"
    ):
        Laplace(SimpleRewardModel(), "reward_modeling", subset, structure)


def test_gridsearch_scores_pairs():
    x, y = pairs(torch.float64)
    model = SimpleRewardModel(4).double()
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    reward = Laplace(model, "reward_modeling", "all", "kron")
    classifier = Laplace(model, "classification", "all", "kron")
    for la in (reward, classifier):
        la.fit(loader)
        la.optimize_prior_precision(method="gridsearch", val_loader=loader, grid_size=5)
    assert torch.equal(reward.prior_precision, classifier.prior_precision)
    assert float(reward.log_likelihood) == pytest.approx(float(classifier.log_likelihood))
