"""Layers of random models on vectors ``(features,)``; see :mod:`tests.core.random_features`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .random_features import EITHER, REFUSE, Block, layer, parameter


@layer("vector")
def linear(rng, shape):
    width = rng.randint(2, 4)
    return nn.Linear(shape[0], width, bias=rng.random() < 0.8), (width,)


@layer("vector")
def layer_norm(rng, shape):
    return nn.LayerNorm(shape[0]), shape


@layer("vector")
def rms_norm(rng, shape):
    """With an epsilon that does not depend on the precision, as the default does."""
    return nn.RMSNorm(shape[0], eps=1e-5), shape


@layer("vector")
def batch_norm(rng, shape):
    return nn.BatchNorm1d(shape[0]), shape


@layer("vector")
def group_norm(rng, shape):
    return nn.Sequential(nn.Linear(shape[0], 6), nn.GroupNorm(2, 6)), (6,)


@layer("vector")
def prelu(rng, shape):
    return nn.PReLU(), shape


@layer("vector")
def prelu_per_channel(rng, shape):
    return nn.PReLU(shape[0]), shape


@layer("vector")
def rrelu(rng, shape):
    return nn.Sequential(nn.Linear(shape[0], 3), nn.RReLU()), (3,)


@layer("vector")
def residual(rng, shape):
    return Block(lambda m, x: x + torch.tanh(m.branch(x)), branch=nn.Linear(shape[0], shape[0])), shape


@layer("vector")
def residual_in_place(rng, shape):
    def run(m, x):
        out = m.branch(x)
        out += x
        return out

    return Block(run, branch=nn.Linear(shape[0], shape[0])), shape


@layer("vector")
def called_twice(rng, shape):
    return Block(lambda m, x: m.shared(torch.tanh(m.shared(x))), shared=nn.Linear(shape[0], shape[0])), shape


@layer("vector")
def tied(rng, shape):
    one, two = nn.Linear(shape[0], shape[0]), nn.Linear(shape[0], shape[0])
    two.weight = one.weight
    return Block(lambda m, x: m.two(torch.tanh(m.one(x))), one=one, two=two), shape


@layer("vector")
def used_outside(rng, shape):
    return Block(lambda m, x: F.linear(torch.tanh(m.one(x)), m.one.weight.T), one=nn.Linear(shape[0], 3)), shape


@layer("vector")
def functional_weight(rng, shape):
    return Block(lambda m, x: torch.einsum("oi,ni->no", m.weight, x), weight=parameter(3, shape[0])), (3,)


@layer("vector")
def gate_without_dimensions(rng, shape):
    return Block(lambda m, x: m.gate * m.inner(x), gate=parameter(), inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector")
def bare_scale(rng, shape):
    return Block(lambda m, x: m.scale * x + m.shift, scale=parameter(*shape), shift=parameter(*shape)), shape


@layer("vector")
def buffer(rng, shape):
    block = Block(lambda m, x: m.inner(x * m.spread), inner=nn.Linear(shape[0], 3))
    block.register_buffer("spread", torch.rand(*shape) + 0.5)
    return block, (3,)


@layer("vector")
def bilinear(rng, shape):
    return Block(lambda m, x: m.inner(x, torch.tanh(x)), inner=nn.Bilinear(shape[0], shape[0], 2)), (2,)


@layer("vector")
def gru_cell(rng, shape):
    return Block(lambda m, x: m.cell(x, m.cell(x)), cell=nn.GRUCell(shape[0], 2)), (2,)


@layer("vector")
def lstm_cell(rng, shape):
    return Block(lambda m, x: m.cell(x)[0], cell=nn.LSTMCell(shape[0], 2)), (2,)


@layer("vector")
def rnn_cell(rng, shape):
    return nn.RNNCell(shape[0], 2), (2,)


@layer("vector")
def also_detached(rng, shape):
    """The layer runs once more without a gradient, as in adapters that normalise by their weight."""

    def run(m, x):
        scale = m.inner(x.detach()).detach().square().mean(1, keepdim=True)
        return m.inner(x) / (1 + scale)

    return Block(run, inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector")
def logged_without_grad(rng, shape):
    def run(m, x):
        with torch.no_grad():
            m.seen = float(m.inner(x).mean())
        return m.inner(x)

    return Block(run, inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector", EITHER)
def stopped_branch(rng, shape):
    return Block(lambda m, x: m.one(x) + m.two(x).detach(), one=nn.Linear(shape[0], 3), two=nn.Linear(shape[0], 3)), (
        3,
    )


@layer("vector")
def branch_on_values(rng, shape):
    def run(m, x):
        if not torch.isfinite(x).all():
            raise ValueError("inputs are not finite")
        return m.inner(x) if float(m.inner.weight.detach().norm()) > 0 else x

    return Block(run, inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector")
def mask_assignment(rng, shape):
    def run(m, x):
        h = m.inner(x).clone()
        h[h < 0] = 0.1
        return h

    return Block(run, inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector")
def mask_assignment_after_norm(rng, shape):
    def run(m, x):
        h = m.norm(x).clone()
        h[h < 0] = 0.1
        return m.scale * h

    return Block(run, norm=nn.LayerNorm(shape[0]), scale=parameter(*shape)), shape


@layer("vector")
def slice_assignment(rng, shape):
    def run(m, x):
        out = torch.zeros_like(x)
        out[:] = m.scale * x
        return out

    return Block(run, scale=parameter(*shape)), shape


@layer("vector")
def nonzero_indices(rng, shape):
    def run(m, x):
        h = m.scale * x
        rows, columns = (x > 0).nonzero(as_tuple=True)
        return h.index_put((rows, columns), h[rows, columns].square())

    return Block(run, scale=parameter(*shape)), shape


class Cube(torch.autograd.Function):
    """A custom function in the old style, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@layer("vector")
def custom_function(rng, shape):
    return Block(lambda m, x: Cube.apply(m.scale * torch.tanh(x)), scale=parameter(*shape)), shape


@layer("vector")
def checkpointed(rng, shape):
    inner = Block(lambda m, x: m.scale * m.inner(x), inner=nn.Linear(shape[0], 3), scale=parameter(3))
    return Block(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=inner), (3,)


@layer("vector", EITHER)
def checkpointed_reentrant(rng, shape):
    def run(m, x):
        return m.inner(x) if m.exact else checkpoint(m.inner, x, use_reentrant=True)

    return Block(run, inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector")
def called_by_keyword(rng, shape):
    return Block(lambda m, x: m.inner(input=x), inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector", EITHER)
def autograd_in_forward(rng, shape):
    def run(m, x):
        with torch.enable_grad():
            h = x if x.requires_grad else x.detach().requires_grad_()
            energy = torch.tanh(m.inner(h)).square().sum()
            return torch.autograd.grad(energy, h, create_graph=True)[0]

    return Block(run, inner=nn.Linear(shape[0], 3)), shape


@layer("vector")
def autocast_inside(rng, shape):
    def run(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = m.inner(x)
        return h.to(x.dtype)

    return Block(run, inner=nn.Linear(shape[0], 3)), (3,)


class StandardisedLinear(nn.Linear):
    """Each row of the weight has mean zero and variance one."""

    def forward(self, x):
        w = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, w / (w.norm(dim=1, keepdim=True) + 1e-3), self.bias)


@layer("vector")
def standardised_linear(rng, shape):
    return StandardisedLinear(shape[0], 3), (3,)


@layer("vector")
def scaled_subclass(rng, shape):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    return Scaled(shape[0], 3), (3,)


@layer("vector", REFUSE)
def functional_dropout(rng, shape):
    return Block(lambda m, x: m.inner(F.dropout(x, 0.5)), inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector", REFUSE)
def noise_in_forward(rng, shape):
    return Block(lambda m, x: m.inner(x + 0.5 * torch.randn_like(x)), inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector", REFUSE)
def stochastic_depth(rng, shape):
    """With a share for every example in place of a coin, so that no two runs are equal."""

    def run(m, x):
        return x + torch.rand(len(x), 1).to(x) * m.branch(x)

    return Block(run, branch=nn.Linear(shape[0], shape[0])), shape


@layer("vector", REFUSE)
def random_weight(rng, shape):
    def run(m, x):
        w = m.weight + 0.5 * torch.randn_like(m.weight)
        return x @ w.T

    return Block(run, weight=parameter(3, shape[0])), (3,)


@layer("vector", REFUSE)
def batch_statistics(rng, shape):
    return nn.Sequential(nn.Linear(shape[0], 3), nn.BatchNorm1d(3, track_running_stats=False)), (3,)


@layer("vector", REFUSE)
def attention_over_batch(rng, shape):
    def run(m, x):
        h = m.inner(x)
        return (h @ h.T).softmax(-1) @ h

    return Block(run, inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector", REFUSE)
def centred_over_batch(rng, shape):
    return Block(lambda m, x: m.inner(x - x.mean(0)), inner=nn.Linear(shape[0], 3)), (3,)


@layer("vector", REFUSE)
def complex_parameter(rng, shape):
    weight = nn.Parameter(torch.randn(3, shape[0], dtype=torch.complex64))
    return Block(lambda m, x: (x.to(m.weight.dtype) @ m.weight.T).abs(), weight=weight), (3,)


@layer("vector")
def product_with_weight(rng, shape):
    """A weight ``(in, out)`` that no module multiplies, and a bias."""
    run = lambda m, x: x @ m.weight + m.bias  # noqa: E731
    return Block(run, weight=parameter(shape[0], 3), bias=parameter(3)), (3,)


@layer("vector")
def stacked_weights(rng, shape):
    """A gated unit whose two weights are one parameter."""

    def run(m, x):
        gate, value = m.weight.chunk(2)
        return torch.sigmoid(F.linear(x, gate)) * F.linear(x, value) - m.shift

    return Block(run, weight=parameter(6, shape[0]), shift=parameter(3)), (3,)


@layer("vector")
def weight_in_three_uses(rng, shape):
    """In a product, its transpose in another, and its mean."""
    run = lambda m, x: torch.tanh(F.linear(x, m.weight)) @ m.weight + m.weight.mean(0)  # noqa: E731
    return Block(run, weight=parameter(3, shape[0])), shape


@layer("vector")
def functional_layer_norm(rng, shape):
    run = lambda m, x: F.layer_norm(x, x.shape[1:], m.weight, m.bias, 1e-3)  # noqa: E731
    return Block(run, weight=parameter(shape[0]), bias=parameter(shape[0])), shape
