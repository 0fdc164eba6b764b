"""Layers of random models on sequences ``(positions, features)``; see :mod:`tests.core.random_features`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .random_features import LAYERS, RIGHT, Block, Feature, layer, parameter


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
