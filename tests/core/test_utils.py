"""The small documented helpers, each against its definition."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, Metric

import laplace.utils
from laplace import Laplace
from laplace.utils import (
    RunningNLLMetric,
    SoDSampler,
    block_diag,
    diagonal_add_scalar,
    expand_prior_precision,
    fix_prior_prec_structure,
    get_nll,
    invsqrt_precision,
    kron,
    normal_samples,
    parameters_per_layer,
    symeig,
    validate,
)
from tests.core.models import CASES, loader, mlp

PATHS = {
    "laplace.utils.utils": [
        "SoDSampler",
        "block_diag",
        "diagonal_add_scalar",
        "expand_prior_precision",
        "fix_prior_prec_structure",
        "get_nll",
        "invsqrt_precision",
        "kron",
        "normal_samples",
        "parameters_per_layer",
        "symeig",
        "validate",
    ],
    "laplace.utils.metrics": ["RunningNLLMetric"],
    "laplace.utils.swag": ["fit_diagonal_swag_var"],
    "laplace.utils.subnetmask": ["SubnetMask", "RandomSubnetMask", "LastLayerSubnetMask", "ModuleNameSubnetMask"],
    "laplace.utils.matrix": ["Kron", "KronDecomposed"],
    "laplace.utils.feature_extractor": ["FeatureExtractor"],
    "laplace.utils.enums": ["SubsetOfWeights", "PriorStructure"],
}


@pytest.mark.parametrize("path", PATHS)
def test_import_paths(path):
    module = importlib.import_module(path)
    for name in PATHS[path]:
        assert getattr(module, name) is getattr(laplace.utils, name)
        assert name in laplace.utils.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = laplace.utils.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_any_module_may_be_imported_first():
    """And none of them needs torchmetrics, which cannot be imported beside a broken torchvision; torch was there before."""
    code = """
import os, sys, torch
for first in ("laplace.utils.utils", "laplace.utils.subnetmask", "laplace.transforms", "laplace"):
    if os.fork() == 0:
        __import__(first)
        print(first, "torchmetrics" in sys.modules, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["False"] * 4


# --- matrices --------------------------------------------------------------------------------------------------------


def positive_definite(n=5):
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T + torch.eye(n)


def test_matrix_helpers():
    m = positive_definite()
    values, vectors = symeig(m)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, m)
    assert values.shape == (5,) and bool((values.diff() >= 0).all())
    root = invsqrt_precision(m)
    torch.testing.assert_close(root @ root.T, torch.linalg.inv(m))
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 5.0], [6.0, 7.0]])
    by_hand = torch.tensor([[0.0, 5, 0, 10], [6, 7, 12, 14], [0, 15, 0, 20], [18, 21, 24, 28]])
    assert torch.equal(kron(a, b), by_hand)
    assert block_diag([a, b]).tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 0, 5], [0, 0, 6, 7]]
    assert diagonal_add_scalar(a, 10.0).tolist() == [[11, 2], [3, 14]]
    assert a.tolist() == [[1, 2], [3, 4]]  # not in place


@pytest.mark.parametrize("diagonal", [True, False])
def test_normal_samples(diagonal):
    covariance = torch.stack([positive_definite(3), torch.zeros(3, 3, dtype=torch.float64)])
    mean = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    given = covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance
    draws = normal_samples(mean, given, 20000, torch.Generator().manual_seed(0))
    assert draws.shape == (20000, 2, 3)
    torch.testing.assert_close(draws[:, 1], mean[1].expand(20000, 3))  # no variance, no noise
    truth = torch.diag(covariance[0].diagonal()) if diagonal else covariance[0]
    scale = covariance[0].diagonal().sqrt()
    # five standard errors: sigma / sqrt(n) of a mean, sigma_i sigma_j sqrt(2 / n) of a covariance
    assert bool(((draws[:, 0].mean(0) - mean[0]).abs() < 5 * scale / 20000**0.5).all())
    assert float(((draws[:, 0].T.cov() - truth).abs() / torch.outer(scale, scale)).max()) < 5 * (2 / 20000) ** 0.5


# --- priors ----------------------------------------------------------------------------------------------------------


def test_prior_structures():
    model = mlp(inputs=2, hidden=3, outputs=1)  # 6 + 3 + 3 + 1 parameters
    assert parameters_per_layer(model) == [6, 3, 3, 1]
    layerwise = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert expand_prior_precision(layerwise, model).tolist() == [1] * 6 + [2] * 3 + [3] * 3 + [4]
    assert expand_prior_precision(torch.tensor(5.0), model).tolist() == [5] * 13
    own = torch.arange(13.0)
    assert torch.equal(expand_prior_precision(own, model), own)
    with pytest.raises(ValueError, match="has 5 values; valid are 1, 4 or 13"):
        expand_prior_precision(torch.ones(5), model)
    model[0].weight.requires_grad_(False)
    assert parameters_per_layer(model) == [3, 3, 1]
    for structure, size in (("scalar", 1), ("layerwise", 4), ("diag", 13)):
        value = fix_prior_prec_structure(2.0, structure, 4, 13, "cpu", torch.float64)
        assert value.tolist() == [2.0] * size and value.dtype is torch.float64
    with pytest.raises(ValueError, match="prior_structure='block' is unknown"):
        fix_prior_prec_structure(2.0, "block", 4, 13, "cpu")


# --- metrics and validation ------------------------------------------------------------------------------------------

PROBS = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
LABELS = torch.tensor([1, 0, 1])
NLLS = [-math.log(0.8), -math.log(0.5), -math.log(0.1)]


def test_nll():
    assert get_nll(PROBS, LABELS).item() == pytest.approx(sum(NLLS) / 3)


def test_running_nll():
    metric = RunningNLLMetric()
    assert isinstance(metric, Metric)
    metric.update(PROBS[:2], LABELS[:2])
    assert metric.compute().item() == pytest.approx(sum(NLLS[:2]) / 2)
    metric.update(PROBS[2:], LABELS[2:])
    assert metric.compute().item() == pytest.approx(sum(NLLS) / 3)
    metric.reset()
    metric.update(PROBS[2:], LABELS[2:])
    assert metric.compute().item() == pytest.approx(NLLS[2])


def test_running_nll_with_positions_and_ignored_labels():
    metric = RunningNLLMetric()
    metric.update(PROBS[None], torch.tensor([[1, -100, 1]]))
    assert metric.compute().item() == pytest.approx((NLLS[0] + NLLS[2]) / 2)
    other = RunningNLLMetric(ignore_index=1)
    other.update(PROBS, LABELS)
    assert other.compute().item() == pytest.approx(NLLS[1])
    metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert math.isfinite(metric.compute().item())  # a probability of zero costs much, not everything
    with pytest.raises(ValueError, match=r"shape \(2,\) do not match probabilities of shape \(3, 2\); expected \(3,\)"):
        metric.update(PROBS, LABELS[:2])
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(RunningNLLMetric().compute().item())


def fitted(name="mlp"):
    case = CASES[name]
    model, x, y = case.make(n=7)
    la = Laplace(model, case.likelihood, "all", "diag")
    la.fit(loader(x, y))
    return la, x, y


def test_validate_with_metrics_and_functions():
    la, x, y = fitted()
    probs = la(x)
    expected = get_nll(probs, y).item()
    metric = RunningNLLMetric()
    metric.update(PROBS, LABELS)  # what an earlier use left in the metric does not count
    assert validate(la, loader(x, y), metric) == pytest.approx(expected)
    assert validate(la, loader(x, y), get_nll) == pytest.approx(expected)
    bridge = validate(la, loader(x, y), get_nll, pred_type="glm", link_approx="bridge")
    assert bridge == pytest.approx(get_nll(la(x, link_approx="bridge"), y).item())
    torch.manual_seed(0)
    sampled = validate(la, [(x, y)], get_nll, "nn", "mc", 5)  # a DataLoader would draw a seed of its own
    torch.manual_seed(0)
    assert sampled == pytest.approx(get_nll(la(x, pred_type="nn", link_approx="mc", n_samples=5), y).item())
    with pytest.raises(ValueError, match="empty"):
        validate(la, [], metric)


def test_validate_regression():
    la, x, y = fitted("regression")
    mean, variance = la(x)
    assert validate(la, loader(x, y), MeanSquaredError().double()) == pytest.approx((mean - y).square().mean().item())

    def loss(means, variances, targets):
        torch.testing.assert_close(variances, variance)
        return (means - targets).abs().mean()

    assert validate(la, loader(x, y), loss) == pytest.approx((mean - y).abs().mean().item())


class Pairs(nn.Module):
    """A reward model: pairs in training, single inputs afterwards."""

    def __init__(self):
        super().__init__()
        self.net = mlp(outputs=1)

    def forward(self, x):
        if x.ndim == 3:
            return self.net(x.flatten(0, 1)).reshape(-1, 2)
        return self.net(x)


def test_validate_reward_models_and_dict_like_batches():
    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 3), torch.arange(6) % 2
    la = Laplace(Pairs(), "reward_modeling", "all", "diag")
    la.fit(loader(x, y))
    assert validate(la, loader(x, y), get_nll) == pytest.approx(get_nll(la(x, fitting=True), y).item())

    class Dicts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, batch):
            return self.net(batch["x"])

    batch = {"x": torch.randn(5, 3), "target": torch.arange(5) % 3}
    la = Laplace(Dicts(), "classification", "all", "diag", dict_key_y="target")
    la.fit([batch])
    expected = get_nll(la(batch), batch["target"]).item()
    assert validate(la, [batch], get_nll, dict_key_y="target") == pytest.approx(expected)
    with pytest.raises(ValueError, match="need the key 'labels'"):
        validate(la, [batch], get_nll)


# --- subset of data --------------------------------------------------------------------------------------------------


def test_subset_of_data_is_the_same_at_every_pass():
    sampler = SoDSampler(N=100, M=10, seed=3)
    chosen = list(sampler)
    assert chosen == list(sampler) == list(SoDSampler(100, 10, 3))
    assert chosen != list(SoDSampler(100, 10, 4))
    assert len(sampler) == len(set(chosen)) == 10 and chosen == sorted(chosen)
    data = TensorDataset(torch.arange(100))
    assert torch.cat([batch for (batch,) in DataLoader(data, batch_size=4, sampler=sampler)]).tolist() == chosen


def test_subset_of_data_is_uniform():
    counts = torch.zeros(20)
    for seed in range(1000):
        counts[list(SoDSampler(20, 5, seed))] += 1
    # binomial with p = 1/4: five standard errors
    assert float((counts / 1000 - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 1000)


@pytest.mark.parametrize("m", [0, 11])
def test_impossible_subsets(m):
    with pytest.raises(ValueError, match=f"A subset of M={m} examples must have between 1 and N=10"):
        SoDSampler(10, m)
