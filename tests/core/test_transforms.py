"""Streaming transforms over parameter trees, against dense curvature written down from its definition."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from laplace import DiagLaplace, FullLaplace
from laplace.transforms import (
    DenseLaplaceState,
    DiagLaplaceState,
    Transform,
    dense_ef,
    dense_ggn,
    dense_hessian,
    diag_fisher,
    diag_ggn,
    trees,
)
from laplace.transforms.trees import flatten
from tests.core import naive
from tests.core.models import CASES, loader, mlp

NOTHING = torch.tensor([])


def problem(n=6, seed=0, likelihood="classification"):
    """A network, its parameters as a tree, a batch."""
    torch.manual_seed(seed)
    model = mlp().double()
    x = torch.randn(n, 3, dtype=torch.float64)
    y = torch.randint(3, (n,)) if likelihood == "classification" else torch.randn(n, 3, dtype=torch.float64)
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}, (x, y)


def functions(model, likelihood="classification", reduction="sum", reverse=False):
    """``forward`` and ``outer_log_likelihood`` (or ``log_posterior``) of a user."""

    def forward(params, batch):
        z = functional_call(model, params, (batch[0],))
        return z, z.detach()

    def outer(z, batch):
        if likelihood == "classification":
            return -F.cross_entropy(z, batch[1], reduction=reduction)
        terms = -0.5 * (z - batch[1]).square().sum(1)
        return terms.sum() if reduction == "sum" else terms

    def log_posterior(params, batch):
        z, aux = forward(params, batch)
        return outer(z, batch), aux

    return forward, outer, log_posterior


def places(params):
    """For every entry of the flattened tree, whose keys are sorted, its place in the model's own order."""
    starts = torch.tensor([0, *(p.numel() for p in params.values())]).cumsum(0)
    numbers = [
        start + torch.arange(p.numel()).reshape(p.shape) for start, p in zip(starts, params.values(), strict=False)
    ]
    return flatten(dict(zip(params, numbers, strict=True)))[0]


def matrix(state):
    """Precision of either state as a matrix in the model's own order."""
    prec = state.prec if isinstance(state, DenseLaplaceState) else torch.diag(flatten(state.prec_diag)[0])
    back = places(state.params).argsort()
    return prec[back][:, back]


def hessian(model, batch, likelihood):
    """Dense Hessian of the summed loss by differentiating twice."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def loss(*parts):
        f = functional_call(model, dict(zip(names, parts, strict=True)), (batch[0],))
        return sum(naive.example_loss(a, b, likelihood) for a, b in zip(f, batch[1], strict=True))

    blocks = torch.autograd.functional.hessian(loss, values)
    rows = [[b.reshape(p.numel(), -1) for b in row] for row, p in zip(blocks, values, strict=True)]
    return torch.cat([torch.cat(row, 1) for row in rows])


def truth(module, model, batch, likelihood):
    if module is dense_hessian:
        return hessian(model, batch, likelihood)
    dense = naive.full(model, *batch, likelihood, "ef" if module in (dense_ef, diag_fisher) else "ggn")
    return torch.diag(dense.diagonal()) if module in (diag_ggn, diag_fisher) else dense


def arguments(module, model, likelihood, reduction):
    forward, outer, log_posterior = functions(model, likelihood, reduction)
    if module in (dense_ggn, diag_ggn):
        return {"forward": forward, "outer_log_likelihood": outer}
    if module is dense_hessian:
        return {"log_posterior": log_posterior}
    return {"log_posterior": log_posterior, "per_sample": reduction == "none"}


MODULES = [dense_ggn, dense_ef, dense_hessian, diag_fisher, diag_ggn]
ids = [module.__name__.rpartition(".")[2] for module in MODULES]


@pytest.mark.parametrize("chunk", [1 << 22, 40])  # all at once; a few rows at a time
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_precision_is_the_curvature_of_the_stream(module, likelihood, reduction, chunk, monkeypatch):
    monkeypatch.setattr(trees, "_CHUNK", chunk)
    model, params, batch = problem(likelihood=likelihood)
    _, _, more = problem(n=15, seed=1, likelihood=likelihood)  # more outputs than parameters: 45 against 31
    transform = module.build(**arguments(module, model, likelihood, reduction))
    assert isinstance(transform, Transform)
    state = transform.init(params)
    assert float(matrix(state).norm()) == 0
    first = transform.update(state, batch)
    second = transform.update(first, more)
    expected = truth(module, model, batch, likelihood)
    assert naive.relative_error(matrix(first), expected) < 1e-10
    assert naive.relative_error(matrix(second), expected + truth(module, model, more, likelihood)) < 1e-10
    assert second.params is params
    torch.testing.assert_close(second.aux, model(more[0]).detach())
    assert float(matrix(state).norm()) == 0  # not in place: earlier states stay


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_inplace_changes_the_precision_itself(module):
    model, params, batch = problem()
    transform = module.build(**arguments(module, model, "classification", "sum"))
    state = transform.init(params)
    expected = matrix(transform.update(state, batch))
    new = transform.update(state, batch, inplace=True)
    torch.testing.assert_close(matrix(state), expected)
    torch.testing.assert_close(matrix(new), expected)
    torch.testing.assert_close(new.aux, model(batch[0]).detach())


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_initial_precision(module):
    model, params, batch = problem()
    dense = module in (dense_ggn, dense_ef, dense_hessian)
    name = "init_prec" if dense else "init_prec_diag"
    settings = arguments(module, model, "classification", "sum")
    assert torch.equal(matrix(module.init(params, 2.5)), 2.5 * torch.eye(31, dtype=torch.float64))
    assert torch.equal(matrix(module.init(params, torch.tensor(2.5))), 2.5 * torch.eye(31, dtype=torch.float64))
    own = torch.arange(31.0, dtype=torch.float64)
    sorted_own = own[places(params)]
    given = torch.diag(sorted_own) if dense else flatten(params)[1](sorted_own)
    transform = module.build(**settings, **{name: given})
    state = transform.init(params)
    transform.update(state, batch, inplace=True)
    assert torch.equal(sorted_own, given.diagonal() if dense else flatten(given)[0])  # the user's tensor stays
    expected = torch.diag(own) + truth(module, model, batch, "classification")
    assert naive.relative_error(matrix(state), expected) < 1e-10
    wrong = torch.eye(3) if dense else {key: value[..., None] for key, value in params.items()}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        module.init(params, wrong)


@pytest.mark.parametrize("shape", [(), (20000,), (100, 200)])
@pytest.mark.parametrize("module", [dense_ggn, diag_ggn], ids=["dense", "diag"])
def test_samples_are_normal(module, shape):
    torch.manual_seed(0)
    params = {"w": torch.randn(2, 2, dtype=torch.float64), "b": torch.randn(1, dtype=torch.float64)}
    root = torch.randn(5, 5, dtype=torch.float64)
    prec = root @ root.T + torch.eye(5)
    if module is diag_ggn:
        prec = torch.diag(prec.diagonal())
        state = DiagLaplaceState(params, flatten(params)[1](prec.diagonal()))
    else:
        state = DenseLaplaceState(params, prec)
    draws = module.sample(state, torch.Size(shape), torch.Generator().manual_seed(1))
    assert draws["w"].shape == (*shape, 2, 2) and draws["b"].shape == (*shape, 1)
    if not shape:
        again = module.sample(state, generator=torch.Generator().manual_seed(1))
        assert torch.equal(draws["w"], again["w"])
        return
    rows = torch.cat([draws["b"].reshape(-1, 1), draws["w"].reshape(-1, 4)], 1)
    mean, covariance = flatten(params)[0], torch.linalg.inv(prec)
    scale = covariance.diagonal().sqrt()
    # five standard errors: sigma / sqrt(n) of a mean, sigma_i sigma_j sqrt(2 / n) of a covariance
    assert bool(((rows.mean(0) - mean).abs() < 5 * scale / 20000**0.5).all())
    assert float(((rows.T.cov() - covariance).abs() / torch.outer(scale, scale)).max()) < 5 * (2 / 20000) ** 0.5


def test_agrees_with_the_posteriors():
    """The same numbers as the classes: a stream of two batches with a prior."""
    model, params, (x, y) = problem(n=8)
    for module, cls in ((dense_ggn, FullLaplace), (diag_ggn, DiagLaplace)):
        la = cls(model, "classification", prior_precision=0.3)
        la.fit(loader(x, y, batch_size=4))
        forward, outer, _ = functions(model)
        transform = module.build(forward, outer, 0.3)
        state = transform.init(params)
        for start in (0, 4):
            state = transform.update(state, (x[start : start + 4], y[start : start + 4]))
        expected = la.posterior_precision
        torch.testing.assert_close(matrix(state), expected if expected.ndim == 2 else torch.diag(expected))


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_layer_norm(module):
    """Whose backward pass has rules of its own under ``torch.func``."""
    model, x, y = CASES["normed"].make()
    params = {name: p.detach() for name, p in model.named_parameters()}
    transform = module.build(**arguments(module, model, "classification", "sum"))
    state = transform.update(transform.init(params), (x, y))
    assert naive.relative_error(matrix(state), truth(module, model, (x, y), "classification")) < 1e-10


# --- any likelihood, any tree ----------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    weights: list[torch.Tensor]
    log_scale: Any


def heteroscedastic():
    """Two outputs in a dictionary (mean and log scale), parameters in a named tuple with a list and a scalar."""
    torch.manual_seed(0)
    params = Parameters(
        [torch.randn(3, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)],
        {"shift": torch.tensor(0.3, dtype=torch.float64)},
    )
    batch = {"x": torch.randn(7, 3, dtype=torch.float64), "y": torch.randn(7, dtype=torch.float64), "note": "kept"}

    def forward(params, batch):
        h = torch.tanh(batch["x"] @ params.weights[0] + params.weights[1])
        return {"mean": h[:, 0], "log_scale": h[:, 1] * params.log_scale["shift"]}, NOTHING

    def outer(z, batch):
        assert batch["note"] == "kept"
        normal = torch.distributions.Normal(z["mean"], z["log_scale"].exp(), validate_args=False)
        return normal.log_prob(batch["y"])

    return params, batch, forward, outer


def direct_ggn(params, batch, forward, outer):
    """``Jᵀ H J`` over the whole batch with Jacobian and Hessian by ``torch.autograd.functional``."""
    vector, unflatten = flatten(params)
    z, shape = flatten(forward(params, batch)[0])
    jacobian = torch.autograd.functional.jacobian(lambda t: flatten(forward(unflatten(t), batch)[0])[0], vector)
    h = torch.autograd.functional.hessian(lambda v: -outer(shape(v), batch).sum(), z)
    return jacobian.T @ h @ jacobian


def test_user_defined_likelihood_over_trees():
    params, batch, forward, outer = heteroscedastic()
    expected = direct_ggn(params, batch, forward, outer)
    dense = dense_ggn.update(dense_ggn.init(params), batch, forward, outer)
    assert naive.relative_error(dense.prec, expected) < 1e-10
    diag = diag_ggn.update(diag_ggn.init(params), batch, forward, outer)
    assert naive.relative_error(flatten(diag.prec_diag)[0], expected.diagonal()) < 1e-10
    assert isinstance(diag.prec_diag, Parameters)
    assert diag.prec_diag.log_scale["shift"].shape == ()
    assert float(torch.linalg.eigvalsh(expected).min()) < -1e-3  # this likelihood is not log-concave: signs are kept


def test_a_likelihood_that_couples_examples():
    params, batch, forward, _ = heteroscedastic()

    def coupled(z, batch):
        return -(z["mean"].sum() ** 2) - z["log_scale"].square().sum()

    expected = direct_ggn(params, batch, forward, coupled)
    dense = dense_ggn.update(dense_ggn.init(params), batch, forward, coupled)
    assert naive.relative_error(dense.prec, expected) < 1e-10
    with pytest.raises(ValueError, match="couples the examples of a batch.*dense_ggn"):
        diag_ggn.update(diag_ggn.init(params), batch, forward, coupled)


def test_parameters_that_require_gradients_keep_no_graph():
    model, _, batch = problem()
    params = dict(model.named_parameters())
    for module in MODULES:
        transform = module.build(**arguments(module, model, "classification", "sum"))
        state = transform.update(transform.init(params), batch)
        assert not matrix(state).requires_grad
        assert all(p.grad is None for p in params.values())


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_values_are_refused():
    model, params, batch = problem()
    _, _, log_posterior = functions(model)
    with pytest.raises(ValueError, match=r"one value per example, not shape \(\)"):
        dense_ef.update(dense_ef.init(params), batch, log_posterior, per_sample=True)
    with pytest.raises(ValueError, match=r"leaves of type \['str'\]"):
        dense_ggn.init({"w": "weights"})
    with pytest.raises(ValueError, match="leaves of type"):
        diag_fisher.update(diag_fisher.init({}), batch, log_posterior)
    with pytest.raises(ValueError, match=r"one common first dimension, the examples; they have \[5, 6\]"):
        dense_ef.update(dense_ef.init(params), (batch[0], batch[1][:5]), lambda p, b: (p["0.bias"].sum(), NOTHING))


def test_precisions_that_are_not_positive_are_refused():
    params = nn.Linear(2, 1).double().state_dict()
    with pytest.raises(ValueError, match="not positive definite"):
        dense_hessian.sample(dense_hessian.init(params, -1.0))
    with pytest.raises(ValueError, match="not positive everywhere"):
        diag_fisher.sample(diag_fisher.init(params))


def test_dictionaries_go_by_their_sorted_keys():
    """So the precision belongs to the same entries as that of other users of optree, in whatever order a tree was filled."""
    x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))

    def forward(params, batch):
        return batch[0] @ params["weight"].T + params["bias"], torch.tensor([])

    def outer(z, batch):
        return torch.log_softmax(z, -1)[torch.arange(len(z)), batch[1]]

    values = {"weight": torch.randn(2, 3).double(), "bias": torch.randn(2).double()}
    precisions = []
    for keys in (["weight", "bias"], ["bias", "weight"]):
        transform = dense_ggn.build(forward, outer)
        precisions.append(transform.update(transform.init({key: values[key] for key in keys}), (x, y)).prec)
    assert torch.equal(*precisions)
    z = x @ values["weight"].T + values["bias"]
    p = z.softmax(1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert torch.allclose(precisions[0][:2, :2], hessians.sum(0))  # the bias comes first
    leaves = optree.tree_leaves(values)
    assert [leaf.shape for leaf in leaves] == [(2,), (2, 3)]


def test_trees_with_nothing_in_places_and_of_several_kinds_of_dictionary():
    params = OrderedDict(b=torch.ones(2), a=[torch.zeros(3), None])
    state = diag_ggn.init(params, init_prec_diag={"a": [torch.full((3,), 2.0), None], "b": torch.full((2,), 3.0)})
    assert state.prec_diag["a"][1] is None
    assert state.prec_diag["b"].tolist() == [3.0, 3.0]
    assert diag_ggn.sample(state, torch.Size([5]))["a"][0].shape == (5, 3)
