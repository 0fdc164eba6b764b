"""Kronecker factors of recurrent layers, attention and functions: those of twins that are made of linear layers and cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace import Laplace

from . import naive
from .test_uses import Function, N, P, attention, flat, targets


def factors(model, x, reduce=False):
    """Sums of Kronecker factors by name, and the names without any."""
    la = Laplace(model, "regression", "all", "kron", backend_kwargs={"kfac_approx": "reduce"} if reduce else None)
    la.fit([(x[:3], targets(model, x[:3])), (x[3:], targets(model, x[3:]))])
    return la.sums.tensors, {name for name, kind, _ in la.coverage if kind == "diag"}


def same_factors(ours, twin, pairs):
    for name, other in pairs.items():
        for side in "AB":
            assert naive.relative_error(ours[f"{name}/{side}"], twin[f"{other}/{side}"]) < 1e-12, (name, side)


def copied(module, values):
    module = module.double()
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)
    return module


FOLDED = {
    "1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "2d": (nn.ConvTranspose2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 0), dilation=(2, 1)), (2, 3, 2)),
    "gaps": (nn.ConvTranspose2d(2, 3, 2, 3, output_padding=2, bias=False), (2, 2, 2)),
}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("case", FOLDED)
def test_a_transposed_convolution_is_a_linear_layer_on_pixels_whose_patches_are_added(case, reduce):
    layer, shape = FOLDED[case]
    torch.manual_seed(1)
    x = torch.randn(N, *shape, dtype=torch.float64)
    model = flat(layer.float(), *shape)[0].double()
    size = layer(x.double()).shape[2:]
    two = lambda value: (1, *value) if len(value) == 1 else value  # noqa: E731
    geometry = {"kernel_size": two(layer.kernel_size), "dilation": two(layer.dilation), "stride": two(layer.stride)}
    pad = (0, *layer.padding) if len(layer.padding) == 1 else layer.padding

    def run(m, x):
        patches = m.pixels(x.flatten(2).mT).mT
        z = F.fold(patches, two(tuple(size)), padding=pad, **geometry)
        z = z if m.bias is None else z + m.bias.view(-1, 1, 1)
        return m.last(z.tanh().flatten(1))

    pixels = nn.Linear(2, layer.weight[0].numel(), bias=False)
    twin = Function(run, pixels=pixels, last=model[3])
    twin.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    twin = copied(twin, {"pixels.weight": layer.weight.detach().flatten(1).T})
    assert torch.allclose(model(x), twin(x), atol=1e-12)
    ours, diagonal = factors(model, x, reduce)
    theirs, _ = factors(twin, x, reduce)
    assert naive.relative_error(ours["0.weight/A"], theirs["pixels.weight/A"]) < 1e-12
    assert naive.relative_error(ours["0.weight/B"], theirs["pixels.weight/B"]) < 1e-12
    assert not diagonal


@pytest.mark.parametrize(("kind", "cell"), [(nn.RNN, nn.RNNCell), (nn.GRU, nn.GRUCell), (nn.LSTM, nn.LSTMCell)])
def test_a_recurrent_layer_is_its_cell_at_every_step(kind, cell):
    torch.manual_seed(2)
    x = torch.randn(N, 3, 3, dtype=torch.float64)
    layer = kind(3, 4, batch_first=True, bidirectional=True).double()
    model = Function(lambda m, x: m.head(m.layer(x)[0].mean(1)), layer=layer, head=nn.Linear(8, 2)).double()

    def steps(cell, x):
        state, found = None, []
        for t in range(x.shape[1]):
            state = cell(x[:, t], state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)

    run = lambda m, x: m.head(torch.cat([steps(m.on, x), steps(m.back, x.flip(1)).flip(1)], -1).mean(1))  # noqa: E731
    values = {key: getattr(layer, f"{key}_l0").detach() for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    back = {key: getattr(layer, f"{key}_l0_reverse").detach() for key in values}
    twin = Function(run, on=copied(cell(3, 4), values), back=copied(cell(3, 4), back), head=model.head)
    assert torch.allclose(model(x), twin(x), atol=1e-12)
    ours, diagonal = factors(model, x)
    pairs = {
        f"layer.{key}_l0{end}": f"{name}.{key}"
        for key in ("weight_ih", "weight_hh")
        for end, name in (("", "on"), ("_reverse", "back"))
    }
    same_factors(ours, factors(twin, x)[0], pairs)
    assert not diagonal


def attending(q, k, v):
    """Attention with two heads of two."""
    q, k, v = (z.unflatten(-1, (2, 2)).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("widths", [(4, 4), (3, 2)])
def test_attention_over_a_memory_is_a_linear_layer_for_each_of_its_inputs(widths):
    torch.manual_seed(4)
    model, shape = attention(**({} if widths == (4, 4) else {"kdim": 3, "vdim": 2}))
    model, x = model.double(), torch.randn(N, *shape, dtype=torch.float64)
    layer = model.layer
    stacked = layer.in_proj_weight is not None
    weights = (
        layer.in_proj_weight.split(4) if stacked else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    )
    lines = [
        copied(nn.Linear(w.shape[1], 4), {"weight": w, "bias": b})
        for w, b in zip(weights, layer.in_proj_bias.split(4), strict=True)
    ]

    def run(m, x):
        q, k, v = m.q(x[..., :4]), m.k(x[:, 1:, 4 : 4 + widths[0]]), m.v(x[:, 1:, 8 - widths[1] :])
        return m.head(m.out(attending(q, k, v)).mean(1))

    twin = Function(run, q=lines[0], k=lines[1], v=lines[2], out=layer.out_proj, head=model.head)
    assert torch.allclose(model(x), twin(x), atol=1e-12)
    ours, diagonal = factors(model, x)
    theirs = factors(twin, x)[0]
    same_factors(ours, theirs, {"layer.out_proj.weight": "out.weight", "head.weight": "head.weight"})
    if not stacked:
        same_factors(ours, theirs, {f"layer.{key}_proj_weight": f"{key}.weight" for key in "qkv"})
        assert diagonal == {"layer.in_proj_bias"}
        return
    assert not diagonal
    truth = torch.block_diag(*(theirs[f"{key}.weight/B"] for key in "qkv"))
    assert naive.relative_error(ours["layer.in_proj_weight/B"], truth) < 1e-12
    mean = (3 * theirs["q.weight/A"] + 2 * theirs["k.weight/A"] + 2 * theirs["v.weight/A"]) / 7  # of all positions
    assert naive.relative_error(ours["layer.in_proj_weight/A"], mean) < 1e-12


def test_functions_of_weights_have_the_factors_of_linear_layers():
    torch.manual_seed(5)
    x = torch.randn(N, 2, 3, dtype=torch.float64)
    run = lambda m, x: (F.linear(x, m.w, m.b).tanh() @ m.v).mean(1)  # noqa: E731
    model = Function(run, w=P(4, 3), b=P(4), v=P(4, 2)).double()
    twin = Function(lambda m, x: m.two(m.one(x).tanh()).mean(1), one=nn.Linear(3, 4), two=nn.Linear(4, 2, bias=False))
    twin = copied(twin, {"one.weight": model.w, "one.bias": model.b, "two.weight": model.v.T})
    ours, diagonal = factors(model, x)
    theirs, _ = factors(twin, x)
    same_factors(ours, theirs, {"w": "one.weight", "v": "two.weight"})
    assert naive.relative_error(ours["b/B"], theirs["one.weight/B"]) < 1e-12
    assert not diagonal


def test_a_weight_that_is_used_otherwise_in_a_later_batch_is_refused():
    def run(m, x):
        return x @ m.w if len(x) > 2 else (x[:, :, None] * m.w).sum(1)

    model, x = Function(run, w=P(3, 2)).double(), torch.randn(N, 3, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "kron")
    with pytest.raises(ValueError, match=r"In this batch, the model uses \['w'\] otherwise than in its first one"):
        la.fit([(x[:3], targets(model, x[:3])), (x[3:], targets(model, x[3:]))])


def half_dead(m, x):
    """A layer whose weight is used again outside of it; the first examples have no gradient at all."""
    h = m.layer(x.relu())
    return F.linear(h.tanh(), m.layer.weight.T).relu() @ m.head


@pytest.mark.parametrize("structure", ["full", "diag", "ekfac"])
def test_uses_outside_of_a_module_are_seen_where_the_first_examples_prove_nothing(structure):
    """Gradients of the first batch are zero, so that the layer's calls alone would seem to give them."""
    torch.manual_seed(0)
    model = Function(half_dead, layer=nn.Linear(3, 4, bias=False), head=P(3, 2)).double()
    x = torch.randn(N, 3, dtype=torch.float64).abs()
    x[0] = -1
    la = Laplace(model, "regression", "all", structure)
    la.fit([(x[i : i + 1], torch.zeros(1, 2, dtype=torch.float64)) for i in range(N)])
    js = naive.jacobians(model, x)
    truth = torch.einsum("ncp,ncq->pq", js, js)
    assert float(js[0].norm()) == 0 < float(truth.norm())
    if structure == "ekfac":
        assert {name for name, kind, _ in la.coverage if kind == "diag"} >= {"layer.weight"}
    else:
        assert naive.relative_error(la.H, truth if structure == "full" else truth.diagonal()) < 1e-12


def test_a_use_outside_of_a_module_in_a_later_batch_is_refused():
    run = lambda m, x: m.layer(x) if len(x) > 2 else m.layer(x) + 0 * m.layer.weight.sum()  # noqa: E731
    model, x = Function(run, layer=nn.Linear(3, 2)).double(), torch.randn(N, 3, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "diag")
    with pytest.raises(ValueError, match=r"the model uses \['layer.weight'\] otherwise than in its first one"):
        la.fit([(x[:3], targets(model, x[:3])), (x[3:], targets(model, x[3:]))])
