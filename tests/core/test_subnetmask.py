"""Strategies that choose a subnetwork, and diagonal SWAG, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from laplace import DiagLaplace, Laplace
from laplace.utils import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    LastLayerSubnetMask,
    ModuleNameSubnetMask,
    ParamNameSubnetMask,
    RandomSubnetMask,
    SubnetMask,
    fit_diagonal_swag_var,
)
from laplace.utils.subnetmask import ScoreBasedSubnetMask
from tests.core.models import loader, mlp


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


# --- masks -----------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A block of two layers, an activation without parameters, a frozen bias."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.act, self.last = nn.Tanh(), nn.Linear(4, 3)
        self.block[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.act(self.block(x)))


def nested():
    torch.manual_seed(0)
    model = Nested().double()
    x = torch.randn(12, 3, dtype=torch.float64)
    return model, loader(x, torch.arange(12) % 3, batch_size=4)


# The parameter vector of Nested: block.0.weight 0-11, block.2.weight 12-27, block.2.bias 28-31, last.weight 32-43,
# last.bias 44-46; block.0.bias is frozen and has no place in it.
NAMED = [
    (ParamNameSubnetMask, {"parameter_names": ["last.bias", "block.0.weight"]}, [*range(12), 44, 45, 46]),
    (ModuleNameSubnetMask, {"module_names": ["block.2"]}, [*range(12, 32)]),
    (ModuleNameSubnetMask, {"module_names": ["block"]}, [*range(32)]),
    (ModuleNameSubnetMask, {"module_names": ["last", "block.0"]}, [*range(12), *range(32, 47)]),
    (LastLayerSubnetMask, {}, [*range(32, 47)]),
    (LastLayerSubnetMask, {"last_layer_name": "last"}, [*range(32, 47)]),
]


@pytest.mark.parametrize("mask, arguments, expected", NAMED)
def test_masks_by_name(mask, arguments, expected):
    model, train_loader = nested()
    mask = mask(model, **arguments)
    chosen = mask.select(train_loader)
    assert chosen.tolist() == expected == mask.indices.tolist()
    assert mask.n_params_subnet == len(expected)
    Laplace(model, "classification", "subnetwork", "diag", subnetwork_indices=chosen).fit(train_loader)
    assert all(module.training for module in model.modules())


def test_a_module_is_not_its_namesakes_beginning():
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(12)])
    assert ModuleNameSubnetMask(model, ["1"]).select().tolist() == [1]  # not "10" and "11"


def variances(model, train_loader):
    la = DiagLaplace(model, "classification")
    la.fit(train_loader)
    return la.posterior_variance


@pytest.mark.parametrize(
    "mask, arguments, scores",
    [
        (LargestMagnitudeSubnetMask, {}, lambda model, _: parameters_to_vector(trainable(model)).abs()),
        (LargestVarianceDiagLaplaceSubnetMask, {"diag_laplace_model": None}, variances),
        (
            LargestVarianceSWAGSubnetMask,
            {"swag_n_snapshots": 3, "swag_lr": 0.1},
            lambda model, data: fit_diagonal_swag_var(model, data, nn.CrossEntropyLoss(), 3, lr=0.1),
        ),
    ],
)
def test_masks_by_score_take_the_largest(mask, arguments, scores):
    model, train_loader = nested()
    if "diag_laplace_model" in arguments:
        arguments = {"diag_laplace_model": DiagLaplace(model, "classification")}
    chosen = mask(model, n_params_subnet=9, **arguments).select(train_loader)
    expected = scores(model, train_loader).detach().sort(descending=True).indices[:9].sort().values
    assert chosen.tolist() == expected.tolist()


def test_random_masks_follow_the_global_generator():
    model, _ = nested()
    counts = torch.zeros(47)
    torch.manual_seed(0)
    for _ in range(400):
        chosen = RandomSubnetMask(model, n_params_subnet=10).select()
        assert len(chosen) == 10 and bool((chosen.diff() > 0).all())
        counts[chosen] += 1
    share = counts / 400  # binomial with p = 10/47: five standard errors
    assert float((share - 10 / 47).abs().max()) < 5 * math.sqrt(10 / 47 * 37 / 47 / 400)
    torch.manual_seed(3)
    one = RandomSubnetMask(model, 10).select()
    torch.manual_seed(3)
    assert torch.equal(RandomSubnetMask(model, 10).select(), one)


class EveryThird(SubnetMask):
    def get_subnet_mask(self, train_loader):
        return (torch.arange(len(self.parameter_vector)) % 3 == 0).long()


class Smallest(ScoreBasedSubnetMask):
    def compute_param_scores(self, train_loader):
        return -self.parameter_vector


def test_users_strategies():
    model, _ = nested()
    assert EveryThird(model).select().tolist() == list(range(0, 47, 3))
    vector = parameters_to_vector(trainable(model))
    assert Smallest(model, 2).select().tolist() == vector.sort().indices[:2].sort().values.tolist()


def wrong_mask(value):
    class Wrong(SubnetMask):
        def get_subnet_mask(self, train_loader):
            return value

    return Wrong


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: LargestMagnitudeSubnetMask(m, 48), "n_params_subnet=48 must lie in 1…47"),
        (lambda m: RandomSubnetMask(m, 0), "n_params_subnet=0 must lie in"),
        (lambda m: RandomSubnetMask(m, None), "n_params_subnet=None must lie in"),
        (
            lambda m: ParamNameSubnetMask(m, ["last.x"]),
            r"parameter_names holds \['last.x'\]; valid names are .*last.bias",
        ),
        (lambda m: ParamNameSubnetMask(m, ["block.0.bias"]), r"holds \['block.0.bias'\]"),
        (lambda m: ParamNameSubnetMask(m, []), r"parameter_names=\[\] must be a non-empty list"),
        (lambda m: ParamNameSubnetMask(m, "last.bias"), "parameter_names='last.bias' must be a non-empty list"),
        (lambda m: ModuleNameSubnetMask(m, ["head"]), r"module_names holds \['head'\]"),
        (lambda m: ModuleNameSubnetMask(m, ["act"]), "'act' has no parameter"),
        (lambda m: LastLayerSubnetMask(m, "head"), r"holds \['head'\]"),
        (lambda m: LastLayerSubnetMask(m).select(), r"call select\(train_loader\)"),
        (lambda m: LargestVarianceSWAGSubnetMask(m, 3).select(), r"call select\(train_loader\)"),
        (
            lambda m: LargestVarianceDiagLaplaceSubnetMask(m, 3, DiagLaplace(m, "classification")).select(),
            r"call select\(train_loader\)",
        ),
        (lambda m: LargestVarianceSWAGSubnetMask(m, 3, likelihood="count"), "likelihood='count' is unknown"),
        (lambda m: wrong_mask(torch.ones(3))(m).select(), r"shape \(3,\), expected \(47,\)"),
        (lambda m: wrong_mask([1])(m).select(), r"shape list, expected \(47,\)"),
        (lambda m: wrong_mask(torch.zeros(47))(m).select(), "0 everywhere"),
        (lambda m: wrong_mask(torch.full((47,), 2))(m).select(), "other than 0 and 1"),
    ],
)
def test_wrong_masks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(nested()[0])


def test_a_mask_is_selected_once():
    mask = LargestMagnitudeSubnetMask(nested()[0], n_params_subnet=4)
    assert mask.n_params_subnet == 4
    with pytest.raises(AttributeError, match=r"call select\(\) first"):
        _ = mask.indices
    mask.select()
    with pytest.raises(ValueError, match="selected already"):
        mask.select()


def test_scores_that_are_nan_choose_nothing():
    model, _ = nested()
    with torch.no_grad():
        model.last.bias[0] = float("nan")
    with pytest.raises(ValueError, match="1 of the scores are NaN"):
        LargestMagnitudeSubnetMask(model, 3).select()


# --- SWAG ------------------------------------------------------------------------------------------------------------


def test_swag_variances_against_a_loop_by_hand():
    model, train_loader = nested()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"n_snapshots_total": 4, "snapshot_freq": 2, "lr": 0.05, "momentum": 0.5, "weight_decay": 0.1}
    ours = fit_diagonal_swag_var(model, train_loader, nn.CrossEntropyLoss(), **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    params = trainable(model)
    velocity = [torch.zeros_like(p) for p in params]
    snapshots = []
    for epoch in range(1, 9):
        for x, y in train_loader:
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), params)
            for p, v, g in zip(params, velocity, grads, strict=True):
                v.mul_(0.5).add_(g + 0.1 * p.detach())
                p.data.sub_(0.05 * v)
        if epoch % 2 == 0:
            snapshots.append(parameters_to_vector(params).detach().clone())
    torch.testing.assert_close(ours, torch.stack(snapshots).var(0, unbiased=False))


def test_swag_variances_keep_their_digits_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1000.0)
    x = torch.zeros(4, 1)  # no gradient but the weight decay: the weight shrinks by 1e-4 of itself per epoch
    ours = fit_diagonal_swag_var(model, loader(x, x, 4), nn.MSELoss(), 4, lr=1e-3, momentum=0.0, weight_decay=0.1)
    steps = torch.tensor([1000.0 * (1 - 1e-4) ** t for t in range(1, 5)], dtype=torch.float64)
    assert ours.item() == pytest.approx(steps.var(unbiased=False).item(), rel=1e-2)
    constant = fit_diagonal_swag_var(model, loader(x, x, 4), nn.MSELoss(), 2, weight_decay=0.0, min_var=1e-6)
    assert constant.item() == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_snapshots_total": 0}, "n_snapshots_total=0"),
        ({"snapshot_freq": 0}, "snapshot_freq=0"),
        ({"lr": 1e200}, "NaN or Inf along the run of SGD; lower lr"),
    ],
)
def test_wrong_swag_runs_are_refused(arguments, message):
    model, train_loader = nested()
    with pytest.raises(ValueError, match=message):
        fit_diagonal_swag_var(model, train_loader, nn.CrossEntropyLoss(), **arguments)


def test_the_last_layer_s_mask_names_its_own_argument():
    with pytest.raises(ValueError, match="^last_layer_name holds \\['head'\\]; valid names are"):
        LastLayerSubnetMask(mlp(), last_layer_name="head")
    with pytest.raises(ValueError, match="last_layer_name='1' has no parameter"):
        LastLayerSubnetMask(mlp(), last_layer_name="1")


class Words(nn.Module):
    """The last layer shares its weight with a table, and is registered by a second name."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.classifier = self.head

    def forward(self, x):
        return self.head(self.table(x).mean(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: LastLayerSubnetMask(model),
        lambda model: LastLayerSubnetMask(model, last_layer_name="head"),
        lambda model: LastLayerSubnetMask(model, last_layer_name="classifier"),
        lambda model: ModuleNameSubnetMask(model, module_names=["head"]),
        lambda model: ModuleNameSubnetMask(model, module_names=["classifier"]),
        lambda model: ParamNameSubnetMask(model, parameter_names=["head.weight", "classifier.bias"]),
    ],
)
def test_parameters_and_modules_with_several_names(make):
    """A weight is listed under its first name, and was left out by its others."""
    chosen = make(Words()).select([(torch.arange(8).reshape(4, 2) % 5, torch.arange(4))])
    assert chosen.tolist() == list(range(25))
