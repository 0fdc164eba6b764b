"""What a random model may hold: one small function per feature, in tables by the place where it acts.

Layers map ``(rng, shape)`` to a module and the shape of its outputs, shapes without the batch dimension. Wrappers change a
linear layer or convolution of a finished model, outer features put something around the model, input features change the
data. Every feature says which outcome is right for it: ``RIGHT``, the numbers; ``EITHER``, the numbers or a refusal;
``REFUSE``, a refusal, since no number would be right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY = 5
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


ACTIVATIONS = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
}
