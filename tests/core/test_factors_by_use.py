"""Kronecker factors of convolutions and biases that no module owns, or whose module has none: against modules and by loops."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace import Laplace

from . import naive
from .test_factors_of_twins import copied, factors, same_factors
from .test_uses import Function, N, P, flat, targets

CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1), F.conv1d, (2, 5)),
    "2d": (nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0), dilation=(1, 2)), F.conv2d, (2, 4, 4)),
    "2d same": (nn.Conv2d(2, 3, 3, padding="same"), F.conv2d, (2, 3, 3)),
    "2d without bias": (nn.Conv2d(2, 3, 2, bias=False), F.conv2d, (2, 3, 3)),
    "3d": (nn.Conv3d(2, 2, 2, (1, 2, 1), (0, 0, 1)), F.conv3d, (2, 3, 3, 2)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), F.conv_transpose1d, (2, 4)),
    "transposed 2d": (nn.ConvTranspose2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 0)), F.conv_transpose2d, (2, 3, 2)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, (1, 2, 2)), F.conv_transpose3d, (2, 2, 2, 2)),
}


def function_of(layer, function):
    """What a layer does, of a weight and bias without a module."""
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    if layer.transposed:
        options["output_padding"] = layer.output_padding
    return lambda x, w, b: function(x, w, b, **options)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_without_a_module_have_the_factors_of_their_module(name, reduce):
    layer, function, shape = CONVOLUTIONS[name]
    torch.manual_seed(1)
    x, twin = torch.randn(N, *shape, dtype=torch.float64), flat(layer.float(), *shape)[0].double()
    run, bias = function_of(layer, function), layer.bias
    model = Function(
        lambda m, x: m.last(run(x, m.w, m.b if bias is not None else None).tanh().flatten(1)),
        w=layer.weight.detach().clone(),
        last=twin[3],
        **({} if bias is None else {"b": bias.detach().clone()}),
    )
    ours, diagonal = factors(model, x, reduce)
    theirs, _ = factors(twin, x, reduce)
    same_factors(ours, theirs, {"w": "0.weight", "last.weight": "3.weight"})
    if bias is not None:
        of_twin = "0.bias/B" if "0.bias/B" in theirs else "0.weight/B"
        assert naive.relative_error(ours["b/B"], theirs[of_twin]) < 1e-12
    assert not diagonal


def sums_of_biases(model, layer, x, reduce):
    """``Σ g gᵀ`` over examples, outputs and pixels of what comes out of a layer; of reduce over sums over pixels."""
    total = 0.0
    for example in x:
        seen = []
        handle = layer.register_forward_hook(lambda m, args, z, seen=seen: seen.append(z))
        f = model(example[None])[0]
        handle.remove()
        for value in f:
            g = torch.autograd.grad(value, seen[0], retain_graph=True)[0][0].flatten(1)
            g = g.sum(1, keepdim=True) if reduce else g
            total = total + g @ g.T
    return total


LAYERS = {
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, 2, output_padding=1), (2, 2, 3)),
    "transposed with gaps": (lambda: nn.ConvTranspose1d(2, 3, 2, 3), (2, 3)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 2, 2)),
    "transposed over what a kernel leaves out": (lambda: nn.ConvTranspose1d(2, 3, 2, 2, output_padding=1), (2, 3)),
    "in groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_bias_of_any_convolution_is_a_block_of_its_output_gradients(name, reduce):
    make, shape = LAYERS[name]
    torch.manual_seed(2)
    model, x = flat(make(), *shape)[0].double(), torch.randn(N, *shape, dtype=torch.float64)
    ours, diagonal = factors(model, x, reduce)
    assert naive.relative_error(ours["0.bias/B"], sums_of_biases(model, model[0], x, reduce)) < 1e-12
    assert diagonal == ({"0.weight"} if model[0].groups > 1 else set())


@pytest.mark.parametrize("name", LAYERS)
def test_predictive_variances_and_second_moments_of_such_biases(name):
    """The variance follows from the blocks; in the basis of EKFAC, the moments are the exact diagonal."""
    make, shape = LAYERS[name]
    torch.manual_seed(3)
    model, x = flat(make(), *shape)[0].double(), torch.randn(N, *shape, dtype=torch.float64)
    js = naive.jacobians(model, x)
    for structure in ("kron", "ekfac"):
        la = Laplace(model, "regression", "all", structure, prior_precision=0.7)
        la.fit([(x, targets(model, x))])
        precision = (la.H_facs if structure == "kron" else la.H).to_matrix() + 0.7 * torch.eye(js.shape[-1]).double()
        assert naive.relative_error(la(x)[1], naive.glm_covariance(js, precision)) < 1e-10
    start = model[0].weight.numel()
    rows = slice(start, start + len(model[0].bias))
    basis = la.H.eigenvectors[1][0]
    truth = (basis.T @ torch.einsum("ncp,ncq->pq", js, js)[rows, rows] @ basis).diagonal()
    assert naive.relative_error((basis.T @ la.H.to_matrix()[rows, rows] @ basis).diagonal(), truth) < 1e-10


@pytest.mark.parametrize("batch_second", [False, True])
def test_a_bias_beside_a_product_is_one_in_whatever_layout(batch_second):
    """Contiguous rows make one node of product and sum, others two; of one example every layout is contiguous."""
    run = lambda m, x: (F.linear(x.mT, m.w, m.b).tanh() @ m.v + m.c).mean(1)  # noqa: E731
    torch.manual_seed(4)
    x = torch.randn(N, 3, 1 if batch_second else 2, dtype=torch.float64)
    model = Function(run, w=P(4, 3), b=P(4), v=P(4, 2), c=P(2)).double()
    twin = Function(lambda m, x: m.two(m.one(x.mT).tanh()).mean(1), one=nn.Linear(3, 4), two=nn.Linear(4, 2))
    values = {"one.weight": model.w, "one.bias": model.b, "two.weight": model.v.T, "two.bias": model.c}
    theirs = factors(copied(twin, values), x)[0]
    la = Laplace(model, "regression", "all", "kron")
    la.fit([(x[:4], targets(model, x[:4])), (x[4:], targets(model, x[4:]))])
    for ours, other in (("w", "one"), ("b", "one"), ("v", "two"), ("c", "two")):
        assert naive.relative_error(la.sums.tensors[f"{ours}/B"], theirs[f"{other}.weight/B"]) < 1e-12
    assert {kind for _, kind, _ in la.coverage} == {"kron"}


def test_one_weight_in_two_convolutions_of_other_strides_has_a_diagonal_block():
    run = lambda m, x: (F.conv1d(F.conv1d(x, m.w).tanh(), m.w, stride=2)).flatten(1)  # noqa: E731
    model, x = Function(run, w=P(2, 2, 2)).double(), torch.randn(N, 2, 5, dtype=torch.float64)
    _, diagonal = factors(model, x)
    js = naive.jacobians(model, x)
    la = Laplace(model, "regression", "all", "kron")
    la.fit([(x, targets(model, x))])
    truth = torch.einsum("ncp,ncp->p", js, js)
    assert diagonal == {"w"} and naive.relative_error(la.H_facs.to_matrix(), torch.diag(truth)) < 1e-12


def test_one_weight_in_two_equal_convolutions_has_the_factors_of_a_module_called_twice():
    torch.manual_seed(5)
    x = torch.randn(N, 2, 4, dtype=torch.float64)
    model = Function(lambda m, x: F.conv1d(F.conv1d(x, m.w).tanh(), m.w).flatten(1), w=P(2, 2, 2)).double()
    twin = Function(lambda m, x: m.one(m.one(x).tanh()).flatten(1), one=nn.Conv1d(2, 2, 2, bias=False))
    same_factors(factors(model, x)[0], factors(copied(twin, {"one.weight": model.w}), x)[0], {"w": "one.weight"})


def test_a_parameter_that_shifts_what_is_no_product_has_a_diagonal_block():
    run = lambda m, x: (x @ m.w).tanh() + m.shift  # noqa: E731
    _, diagonal = factors(Function(run, w=P(3, 2), shift=P(2)).double(), torch.randn(N, 3, dtype=torch.float64))
    assert diagonal == {"shift"}


def test_a_table_that_is_the_head_too_has_a_diagonal_block_and_says_why():
    torch.manual_seed(6)
    table, head = nn.Embedding(7, 3), nn.Linear(3, 7)
    head.weight = table.weight
    model = Function(lambda m, x: m.head(m.table(x).tanh().mean(1)), table=table, head=head).double()
    x = torch.randint(7, (N, 4))
    js = naive.jacobians(model, x)
    la = Laplace(model, "regression", "all", "kron")
    with pytest.warns(UserWarning, match="table.weight .*looked up and multiplied, which have no factors in common"):
        la.fit([(x, targets(model, x))])
    truth = torch.einsum("ncp,ncp->p", js, js)[:21]
    assert naive.relative_error(la.H_facs.to_matrix()[:21, :21], torch.diag(truth)) < 1e-12


def test_no_warning_where_nothing_that_has_factors_is_left_without():
    torch.manual_seed(7)
    model, x = flat(nn.ConvTranspose1d(2, 3, 2), 2, 3)[0].double(), torch.randn(N, 2, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Laplace(model, "regression", "all", "kron").fit([(x, targets(model, x))])
