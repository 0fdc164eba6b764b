"""Layers of random models on tokens ``(positions,)``; see :mod:`tests.core.random_features`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .random_features import EITHER, LAYERS, RIGHT, VOCABULARY, Block, Feature, layer, parameter


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
