"""What a random model may hold: one small function per feature, in tables by the place where it acts.

Layers map ``(rng, shape)`` to a module and the shape of its outputs, shapes without the batch dimension. Wrappers change a
linear layer or convolution of a finished model, outer features put something around the model, input features change the
data. Every feature says which outcome is right for it: ``RIGHT``, the numbers; ``EITHER``, the numbers or a refusal;
``REFUSE``, a refusal, since no number would be right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

RIGHT, EITHER, REFUSE = "right", "right or refused", "refused"


@dataclass(frozen=True)
class Feature:
    """One function of a table.

    Attributes:
        apply: See the tables.
        outcome: What the library has to do.
        kind: Kind of the layer's inputs: ``vector``, ``sequence``, ``signal``, ``image``, ``volume`` or ``tokens``.
        gives: Kind of its outputs.
    """

    apply: Callable
    outcome: str = RIGHT
    kind: str = ""
    gives: str = ""


LAYERS: dict[str, Feature] = {}
WRAPPERS: dict[str, Feature] = {}
OUTER: dict[str, Feature] = {}
INPUTS: dict[str, Feature] = {}


def layer(kind, outcome=RIGHT, gives=None):
    def register(function):
        LAYERS[function.__name__] = Feature(function, outcome, kind, gives or kind)
        return function

    return register


def into(table, outcome=RIGHT):
    def register(function):
        table[function.__name__] = Feature(function, outcome)
        return function

    return register


class Block(nn.Module):
    """Named parts, and a function of the block and its inputs; ``exact`` asks for what plain autograd can differentiate."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run, self.exact = run, False
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.run(self, *args)


def parameter(*shape):
    return nn.Parameter(1 + 0.3 * torch.randn(shape))


# --- vectors (features,) ----------------------------------------------------------------------------------------------


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


# --- sequences (positions, features) ----------------------------------------------------------------------------------


@layer("sequence")
def token_linear(rng, shape):
    return nn.Linear(shape[1], 3), (shape[0], 3)


@layer("sequence")
def token_layer_norm(rng, shape):
    return nn.LayerNorm(shape[1]), shape


@layer("sequence")
def token_rms_norm(rng, shape):
    return nn.RMSNorm(shape[1], eps=1e-5), shape


def recurrent(kind):
    return lambda rng, shape: (
        Block(lambda m, x: m.inner(x)[0], inner=kind(shape[1], 2, batch_first=True)),
        (shape[0], 2),
    )


LAYERS["gru"] = Feature(recurrent(nn.GRU), RIGHT, "sequence", "sequence")
LAYERS["lstm"] = Feature(recurrent(nn.LSTM), RIGHT, "sequence", "sequence")
LAYERS["rnn"] = Feature(recurrent(nn.RNN), RIGHT, "sequence", "sequence")


@layer("sequence")
def gru_batch_second(rng, shape):
    def run(m, x):
        return m.inner(x.transpose(0, 1))[0].transpose(0, 1)

    return Block(run, inner=nn.GRU(shape[1], 2)), (shape[0], 2)


@layer("sequence")
def attention(rng, shape):
    inner = nn.MultiheadAttention(shape[1], 1, batch_first=True)
    return Block(lambda m, x: m.inner(x, x, x, need_weights=False)[0], inner=inner), shape


@layer("sequence")
def attention_with_padding(rng, shape):
    """Keys whose first feature is large are padding, but never the first."""

    def run(m, x):
        padded = x[..., 0] > 0.8
        padded = padded & (torch.arange(x.shape[1]) > 0)
        return m.inner(x, x, x, key_padding_mask=padded, need_weights=False)[0]

    return Block(run, inner=nn.MultiheadAttention(shape[1], 1, batch_first=True)), shape


@layer("sequence")
def attention_over_a_memory(rng, shape):
    """Queries of all positions; keys and values of others, and of fewer features where those have widths of their own."""
    widths = {"kdim": max(1, shape[1] - 1), "vdim": 1} if rng.random() < 0.5 else {}
    k, v = widths.get("kdim", shape[1]), widths.get("vdim", shape[1])
    run = lambda m, x: m.inner(x, x[:, 1:, :k].cos(), x[:, 1:, :v], need_weights=False)[0]  # noqa: E731
    return Block(run, inner=nn.MultiheadAttention(shape[1], 1, batch_first=True, **widths)), shape


@layer("sequence")
def recurrent_both_ways(rng, shape):
    kind = rng.choice((nn.LSTM, nn.GRU, nn.RNN))
    options = {"proj_size": 1} if kind is nn.LSTM and rng.random() < 0.5 else {}
    inner = kind(shape[1], 2, num_layers=rng.randint(1, 2), bidirectional=True, batch_first=True, **options)
    return Block(lambda m, x: m.inner(x)[0], inner=inner), (shape[0], 2 * options.get("proj_size", 2))


@layer("sequence")
def class_token(rng, shape):
    """A token that every example is given, learned positions and a scale."""

    def run(m, x):
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
        return (m.inner(x.mean(1, keepdim=True)) + x)[:, : shape[0]] * m.scale

    parts = {
        "token": parameter(1, 1, shape[1]),
        "positions": parameter(shape[0] + 1, shape[1]),
        "scale": parameter(shape[1]),
    }
    return Block(run, inner=nn.Linear(shape[1], shape[1]), **parts), shape


@layer("sequence")
def relative_positions(rng, shape):
    """A bias by the distance of two positions, in attention without further weights."""
    places = torch.arange(shape[0])
    distance = (places[:, None] - places).abs()

    def run(m, x):
        scores = (x @ x.mT)[:, None] + m.table[distance].permute(2, 0, 1)
        return (scores.softmax(-1) @ x[:, None]).mean(1)

    return Block(run, table=parameter(shape[0], 2)), shape


@layer("sequence")
def weight_positions_first(rng, shape):
    """A weight without a module that sees positions first and then examples."""
    run = lambda m, x: (x.transpose(0, 1) @ m.weight + m.bias).transpose(0, 1)  # noqa: E731
    return Block(run, weight=parameter(shape[1], 3), bias=parameter(3)), (shape[0], 3)


@layer("sequence")
def attention_by_hand(rng, shape):
    def run(m, x):
        q, k, v = m.packed(x).chunk(3, -1)
        return m.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])

    return Block(run, packed=nn.Linear(shape[1], 6), out=nn.Linear(2, shape[1])), shape


@layer("sequence")
def encoder_layer(rng, shape):
    return nn.TransformerEncoderLayer(shape[1], 1, 2, dropout=0.0, batch_first=True), shape


@layer("sequence")
def learned_positions(rng, shape):
    return Block(lambda m, x: x + m.positions, positions=parameter(*shape)), shape


@layer("sequence")
def folded_positions(rng, shape):
    def run(m, x):
        return m.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    return Block(run, inner=nn.Linear(shape[1], 3)), (shape[0], 3)


@layer("sequence")
def folded_positions_first(rng, shape):
    """Positions are folded into the batch in the other order."""

    def run(m, x):
        return m.inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)

    return Block(run, inner=nn.Linear(shape[1], 3)), (shape[0], 3)


@layer("sequence")
def positions_first(rng, shape):
    return Block(lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=nn.Linear(shape[1], 3)), (shape[0], 3)


@layer("sequence")
def selected_positions(rng, shape):
    """The layer sees the positions that are not padding, of all examples in one."""

    def run(m, x):
        mask = x[..., 0] < 0.8
        out = torch.zeros(*x.shape[:2], 3, dtype=x.dtype)
        out[mask] = m.inner(x[mask]).to(x.dtype)
        return out

    return Block(run, inner=nn.Linear(shape[1], 3)), (shape[0], 3)


@layer("sequence")
def convolution_over_time(rng, shape):
    inner = nn.Conv1d(shape[1], 2, 2, padding="same")
    return Block(lambda m, x: m.inner(x.transpose(1, 2)).transpose(1, 2), inner=inner), (shape[0], 2)


# --- signals, images, volumes (channels, …) ---------------------------------------------------------------------------


def convolution(rng, shape, kind, **given):
    small = min(shape[1:]) < 4  # then the output is not smaller than two by two
    options = {"padding": rng.choice([0, 1]), "dilation": rng.choice([1, 1, 2]), "stride": rng.choice([1, 1, 2])}
    if small:
        options |= {"padding": 1, "stride": 1}
    if options["padding"] == 0:
        options["dilation"] = 1
    options |= {"groups": 1, "bias": rng.random() < 0.8, **given}
    module = kind(shape[0], options["groups"] * rng.randint(1, 2), 2, **options)
    with torch.no_grad():
        return module, tuple(module(torch.zeros(1, *shape)).shape[1:])


CONVOLUTIONS = {"signal": nn.Conv1d, "image": nn.Conv2d, "volume": nn.Conv3d}
TRANSPOSED = {"signal": nn.ConvTranspose1d, "image": nn.ConvTranspose2d, "volume": nn.ConvTranspose3d}
NORMS = {"signal": nn.BatchNorm1d, "image": nn.BatchNorm2d, "volume": nn.BatchNorm3d}


def spatial(name, kind, function, outcome=RIGHT):
    LAYERS[name] = Feature(function, outcome, kind, kind)


for _kind, _conv in CONVOLUTIONS.items():
    _n = {"signal": 1, "image": 2, "volume": 3}[_kind]
    spatial(f"conv{_n}d", _kind, lambda rng, s, c=_conv: convolution(rng, s, c))
    spatial(f"conv{_n}d_grouped", _kind, lambda rng, s, c=_conv: convolution(rng, s, c, groups=s[0]))
    spatial(f"conv{_n}d_same", _kind, lambda rng, s, c=_conv: convolution(rng, s, c, padding="same", stride=1))
    spatial(
        f"conv{_n}d_circular", _kind,
        lambda rng, s, c=_conv: convolution(rng, s, c, padding=1, dilation=1, padding_mode="circular"),
    )  # fmt: skip
    spatial(
        f"conv{_n}d_transposed", _kind,
        lambda rng, s, c=TRANSPOSED[_kind]: convolution(rng, s, c, padding=0, dilation=1),
    )  # fmt: skip
    spatial(f"batch_norm{_n}d", _kind, lambda rng, s, c=NORMS[_kind]: (c(s[0]), s))
    spatial(f"group_norm{_n}d", _kind, lambda rng, s: (nn.GroupNorm(1, s[0]), s))
spatial("conv2d_reflect", "image", lambda rng, s: convolution(rng, s, nn.Conv2d, padding=1, padding_mode="reflect"))
spatial("instance_norm", "image", lambda rng, s: (nn.InstanceNorm2d(s[0], affine=True), s))
spatial("spatial_layer_norm", "image", lambda rng, s: (nn.LayerNorm(s), s))
spatial("channel_prelu", "image", lambda rng, s: (nn.PReLU(s[0]), s))


@layer("image")
def depthwise_separable(rng, shape):
    channels = shape[0]
    depthwise = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels)
    return nn.Sequential(depthwise, nn.Tanh(), nn.Conv2d(2 * channels, 2, 1)), (2, *shape[1:])


class StandardisedConv(nn.Conv2d):
    """Each filter has mean zero and norm one."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.flatten(1).norm(dim=1)[:, None, None, None] + 1e-3), self.bias)


@layer("image")
def standardised_conv(rng, shape):
    return StandardisedConv(shape[0], 2, 2), (2, shape[1] - 1, shape[2] - 1)


class ConvSame(nn.Conv2d):
    """Pads in its forward pass, as networks converted from elsewhere do."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


@layer("image")
def conv_pads_in_forward(rng, shape):
    return ConvSame(shape[0], 2, 2), (2, *shape[1:])


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image, which permutes in its forward pass."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@layer("image")
def functional_convolution(rng, shape):
    """Transposed or not, with groups or not, of weights without a module; then a scale of every channel."""
    groups = shape[0] if rng.random() < 0.3 else 1
    turned = rng.random() < 0.5
    weight = (
        parameter(shape[0], 2 * shape[0] // groups, 2, 2)
        if turned
        else parameter(2 * shape[0], shape[0] // groups, 2, 2)
    )
    convolve = F.conv_transpose2d if turned else F.conv2d
    run = lambda m, x: convolve(x, m.weight, m.bias, padding=1, groups=groups) * m.scale[:, None, None]  # noqa: E731
    size = tuple(n - 1 if turned else n + 1 for n in shape[1:])
    block = Block(run, weight=weight, bias=parameter(2 * shape[0]), scale=parameter(2 * shape[0]))
    return block, (2 * shape[0], *size)


@layer("image")
def conv2d_transposed_with_gaps(rng, shape):
    """Pixels of the output that no patch reaches, and groups or none."""
    groups = shape[0] if rng.random() < 0.4 else 1
    inner = nn.ConvTranspose2d(
        shape[0], 2 * shape[0], 2, stride=3, padding=1, output_padding=rng.randint(0, 2), groups=groups
    )
    extra = inner.output_padding[0]
    return inner, (2 * shape[0], *((n - 1) * 3 - 2 + 2 + extra for n in shape[1:]))


@layer("image")
def channel_norm(rng, shape):
    return ChannelNorm(shape[0]), shape


@layer("image")
def channels_last_linear(rng, shape):
    run = lambda m, x: m.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: E731
    return Block(run, inner=nn.Linear(shape[0], 2)), (2, *shape[1:])


@layer("image")
def channels_last_memory(rng, shape):
    conv = nn.Conv2d(shape[0], 2, 2)
    run = lambda m, x: m.inner(x.contiguous(memory_format=torch.channels_last))  # noqa: E731
    return Block(run, inner=conv).to(memory_format=torch.channels_last), (2, shape[1] - 1, shape[2] - 1)


# --- tokens (positions,) ----------------------------------------------------------------------------------------------

VOCABULARY = 5


def embedding_layer(outcome=RIGHT, **options):
    function = lambda rng, shape: (nn.Embedding(VOCABULARY, 3, **options), (shape[0], 3))  # noqa: E731
    return Feature(function, outcome, "tokens", "sequence")


LAYERS["embedding"] = embedding_layer()
LAYERS["embedding_padding"] = embedding_layer(padding_idx=1)
LAYERS["embedding_max_norm"] = embedding_layer(EITHER, max_norm=1.0)
LAYERS["embedding_by_frequency"] = embedding_layer(EITHER, scale_grad_by_freq=True)
LAYERS["embedding_sparse"] = embedding_layer(EITHER, sparse=True)


@layer("tokens", gives="sequence")
def embedding_tied(rng, shape):
    """The table also maps back, as the head of a language model does."""
    run = lambda m, x: F.linear(torch.tanh(m.inner(m.table(x))), m.table.weight)  # noqa: E731
    return Block(run, table=nn.Embedding(VOCABULARY, 3), inner=nn.Linear(3, 3)), (shape[0], VOCABULARY)


@layer("tokens", gives="sequence")
def embedding_without_a_module(rng, shape):
    """Looked up by a function or an index, and added to learned places."""
    look = F.embedding if rng.random() < 0.5 else (lambda x, table: table[x])
    run = lambda m, x: look(x, m.table) + m.places  # noqa: E731
    return Block(run, table=parameter(VOCABULARY, 3), places=parameter(shape[0], 3)), (shape[0], 3)


@layer("tokens", gives="vector")
def embedding_bag(rng, shape):
    return nn.EmbeddingBag(VOCABULARY, 3, mode="mean"), (3,)


@layer("tokens", gives="sequence")
def padded_tokens(rng, shape):
    """Embedded and mapped where a token is no padding; the others stay zero."""

    def run(m, x):
        mask = x != 0
        out = torch.zeros(*x.shape, 3, dtype=m.table.weight.dtype)
        out[mask] = m.inner(m.table(x[mask])).to(out.dtype)
        return out

    return Block(run, table=nn.Embedding(VOCABULARY, 3), inner=nn.Linear(3, 3)), (shape[0], 3)


# --- activations, after every layer -----------------------------------------------------------------------------------

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
}

# --- wrappers: (rng, module with a weight, model) ---------------------------------------------------------------------


@into(WRAPPERS)
def weight_norm_old(rng, module, model):
    with_warnings_off(nn.utils.weight_norm, module)


@into(WRAPPERS)
def weight_norm(rng, module, model):
    parametrizations.weight_norm(module)


@into(WRAPPERS)
def spectral_norm_old(rng, module, model):
    nn.utils.spectral_norm(module)
    for _ in range(20):  # until its vectors are singular ones, as after training
        for hook in module._forward_pre_hooks.values():
            hook(module.train(), None)
    module.eval()


@into(WRAPPERS)
def spectral_norm(rng, module, model):
    parametrizations.spectral_norm(module)


@into(WRAPPERS)
def orthogonal(rng, module, model):
    parametrizations.orthogonal(module)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x - 0.1


@into(WRAPPERS)
def own_parametrization(rng, module, model):
    parametrize.register_parametrization(module, "weight", Doubled())


@into(WRAPPERS)
def pruned(rng, module, model):
    prune.random_unstructured(module, "weight", amount=0.4)


@into(WRAPPERS)
def pruned_made_permanent(rng, module, model):
    prune.random_unstructured(module, "weight", amount=0.4)
    prune.remove(module, "weight")


@into(WRAPPERS)
def frozen_weight(rng, module, model):
    module.weight.requires_grad_(False)


@into(WRAPPERS)
def frozen_bias(rng, module, model):
    if module.bias is not None:
        module.bias.requires_grad_(False)


@into(WRAPPERS)
def frozen_all_but_one(rng, module, model):
    for p in model.parameters():
        p.requires_grad_(p is module.weight)


@into(WRAPPERS)
def forward_hook_that_scales(rng, module, model):
    module.register_forward_hook(lambda m, args, out: 1.5 * out)


@into(WRAPPERS)
def forward_pre_hook_that_scales(rng, module, model):
    module.register_forward_pre_hook(lambda m, args: tuple(0.5 * x for x in args))


@into(WRAPPERS)
def left_in_training_mode(rng, module, model):
    model.train()


def with_warnings_off(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


# --- outer features: (rng, model) to a model --------------------------------------------------------------------------


@into(OUTER)
def scaled_output(rng, model):
    return Block(lambda m, x: 20 * m.net(x), net=model)


@into(OUTER)
def small_scaled_output(rng, model):
    """As scaled_output, of logits that vanish next to an absolute tolerance."""
    with torch.no_grad():
        for p in model.head.parameters():
            p.mul_(1e-6)
    return Block(lambda m, x: 20 * m.net(x), net=model)


@into(OUTER, EITHER)
def classes_first(rng, model):
    """Logits (batch, classes, positions): with as many positions as classes, both readings fit the targets."""
    return Block(lambda m, x: m.net(x).transpose(1, 2), net=model)


@into(OUTER)
def shifted_output(rng, model):
    return Block(lambda m, x: m.net(x) + m.shift, net=model, shift=parameter())


@into(OUTER)
def output_changed_in_place(rng, model):
    def run(m, x):
        out = m.net(x)
        out *= 0.5
        return out

    return Block(run, net=model)


@into(OUTER, EITHER)
def input_changed_in_place(rng, model):
    def run(m, x):
        if x.is_floating_point():
            x.mul_(0.5)
        else:
            x.add_(1).remainder_(VOCABULARY)
        return m.net(x)

    return Block(run, net=model)


@into(OUTER, EITHER)
def tuple_output(rng, model):
    return Block(lambda m, x: (m.net(x), None), net=model)


@into(OUTER, EITHER)
def dict_output(rng, model):
    return Block(lambda m, x: {"logits": m.net(x)}, net=model)


@into(OUTER)
def dict_input(rng, model):
    return Block(lambda m, x: m.net(x["input_ids"]), net=model)


@into(OUTER)
def dict_input_with_a_flag(rng, model):
    return Block(lambda m, x: m.net(x["input_ids"]) * (2.0 if x["doubled"] else 1.0), net=model)


@into(OUTER, EITHER)
def tuple_input(rng, model):
    return Block(lambda m, x: m.net(x[0]), net=model)


@into(OUTER, EITHER)
def one_value_per_example(rng, model):
    return Block(lambda m, x: m.net(x).flatten(1)[:, 0], net=model)


@into(OUTER, EITHER)
def feature_backbone_without_grad(rng, model):
    """All but the head runs under ``no_grad``."""

    def run(m, x):
        with torch.no_grad():
            h = m.net.features(x)
        return m.net.head(h)

    return Block(run, net=model)


@into(OUTER, EITHER)
def inference_backbone(rng, model):
    def run(m, x):
        with torch.inference_mode():
            h = m.net.features(x)
        return m.net.head(h.clone())  # no inference tensor any more

    return Block(run, net=model)


@into(OUTER)
def nested_sequential(rng, model):
    return nn.Sequential(nn.Identity(), nn.Sequential(model))


# --- input features: (rng, x) to x ------------------------------------------------------------------------------------


@into(INPUTS)
def blank_first(rng, x):
    x[0] = 0
    return x


@into(INPUTS)
def blank_last(rng, x):
    x[-1] = 0
    return x


@into(INPUTS)
def blank_probed(rng, x):
    """The eighth example, or the last of a smaller first batch, which libraries like to probe."""
    x[min(7, len(x) - 1)] = 0
    x[2] = 0
    return x


@into(INPUTS)
def blank_first_batch(rng, x):
    x[:3] = 0
    return x


@into(INPUTS)
def large_inputs(rng, x):
    return 4 * x if x.is_floating_point() else x


@into(INPUTS)
def equal_examples(rng, x):
    x[1] = x[0]
    return x


@into(INPUTS)
def half_blank_positions(rng, x):
    """The later half of every odd example is zero, as of padded sequences."""
    if x.ndim > 1 and x.shape[1] > 1:
        x[1::2, x.shape[1] // 2 :] = 0
    return x
