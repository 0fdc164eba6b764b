"""Every layer of ``torch.nn`` that has parameters or state, in a tiny model; and which classes have none.

A case is a module and the shape of one input. What is no tensor of one value per example at the end is made one by ``read``.
A class of a later torch that is in none of these tables fails :mod:`tests.core.test_torch_layers` until it is in one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY = 5


@dataclass(frozen=True)
class Layer:
    """One way to use a layer.

    Attributes:
        make: Makes it.
        shape: Shape of one input; one dimension of integers for ``tokens``.
        call: How it is called on a batch.
        refused: Part of the refusal, where there is no right number.
        tokens: Whether inputs are indices.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda m, x: m(x)
    refused: str = ""
    tokens: bool = False


class Around(nn.Module):
    """Something trainable before the layer, the layer, and a linear layer after it."""

    def __init__(self, case: Layer):
        super().__init__()
        self.call, self.tokens = case.call, case.tokens
        self.scale = nn.Parameter(torch.rand(case.shape) + 0.5)
        self.inner = case.make()
        self._randomise()
        x = torch.zeros(2, *case.shape, dtype=torch.long) if case.tokens else torch.randn(2, *case.shape)
        with torch.no_grad():
            self.last = nn.Linear(self.eval()._features(x).shape[1], 2)

    @torch.no_grad()
    def _randomise(self):
        """Weights that are not all ones or zeros, running statistics as of training."""
        for p in self.inner.parameters():
            if not isinstance(p, nn.parameter.UninitializedParameter):
                p.add_(0.3 * torch.randn_like(p))
        for module in self.inner.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor) and module.running_var.numel():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def _features(self, x):
        x = x if self.tokens else self.scale * x
        return self.call(self.inner, x).flatten(1)

    def forward(self, x):
        return self.last(torch.tanh(self._features(x)))


def first(m, x):
    """What recurrent layers give for every position."""
    return m(x)[0]


def itself(m, x):
    return m(x, x, x)[0]


def second(m, x):
    """Of layers that take the batch second."""
    return m(x.transpose(0, 1))[0].transpose(0, 1)


def other_memory(m, x):
    memory = torch.cat([x, x.flip(1)], 1)
    return m(x, memory)


def of_memory(m, x):
    return m(x, x.flip(1), x.flip(1).square())[0]


def for_every_class(m, x):
    return torch.stack([m(x, torch.full((len(x),), c)) for c in range(m.num_classes)], 1)


def _attention(**options):
    return lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options)


def _encoder(**options):
    return nn.TransformerEncoderLayer(4, 2, 3, batch_first=True, **options)


LAYERS: dict[str, dict[str, Layer]] = {
    "Linear": {
        "bias": Layer(lambda: nn.Linear(3, 2), (3,)),
        "no bias, positions": Layer(lambda: nn.Linear(3, 2, bias=False), (2, 3)),
    },
    "Bilinear": {"": Layer(lambda: nn.Bilinear(3, 3, 2), (3,), lambda m, x: m(x, x.square()))},
    "Conv1d": {
        "": Layer(lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1), (2, 4)),
        "groups": Layer(lambda: nn.Conv1d(2, 4, 2, groups=2, padding="same"), (2, 4)),
    },
    "Conv2d": {
        "": Layer(lambda: nn.Conv2d(2, 2, 2, dilation=2), (2, 3, 4)),
        "reflected": Layer(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", bias=False), (2, 3, 3)),
        "depthwise": Layer(lambda: nn.Conv2d(2, 2, 2, groups=2), (2, 3, 3)),
    },
    "Conv3d": {"": Layer(lambda: nn.Conv3d(1, 2, 2, padding=(0, 1, 0)), (1, 2, 2, 3))},
    "ConvTranspose1d": {
        "": Layer(lambda: nn.ConvTranspose1d(2, 3, 2), (2, 3)),
        "strided": Layer(lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 3)),
        "gaps": Layer(lambda: nn.ConvTranspose1d(2, 2, 2, stride=3, dilation=2), (2, 3)),
    },
    "ConvTranspose2d": {
        "": Layer(lambda: nn.ConvTranspose2d(2, 2, 2, stride=2), (2, 2, 3)),
        "no bias": Layer(lambda: nn.ConvTranspose2d(2, 2, (2, 1), bias=False, padding=(1, 0)), (2, 2, 2)),
    },
    "ConvTranspose3d": {"": Layer(lambda: nn.ConvTranspose3d(1, 2, 2), (1, 2, 1, 2))},
    "Embedding": {
        "": Layer(lambda: nn.Embedding(VOCABULARY, 2), (3,), tokens=True),
        "padding": Layer(lambda: nn.Embedding(VOCABULARY, 2, padding_idx=1), (3,), tokens=True),
        "by frequency": Layer(lambda: nn.Embedding(VOCABULARY, 2, scale_grad_by_freq=True), (3,), tokens=True),
        "sparse": Layer(lambda: nn.Embedding(VOCABULARY, 2, sparse=True), (3,), tokens=True),
    },
    "EmbeddingBag": {
        "mean": Layer(lambda: nn.EmbeddingBag(VOCABULARY, 2), (3,), tokens=True),
        "sum": Layer(lambda: nn.EmbeddingBag(VOCABULARY, 2, mode="sum", padding_idx=0), (3,), tokens=True),
        "max": Layer(lambda: nn.EmbeddingBag(VOCABULARY, 2, mode="max"), (3,), tokens=True),
        "sparse": Layer(lambda: nn.EmbeddingBag(VOCABULARY, 2, sparse=True), (3,), tokens=True),
    },
    "LayerNorm": {
        "": Layer(lambda: nn.LayerNorm((2, 3)), (2, 3)),
        "no bias": Layer(lambda: nn.LayerNorm(3, bias=False), (2, 3)),
    },
    "RMSNorm": {"": Layer(lambda: nn.RMSNorm(3), (2, 3))},
    "GroupNorm": {"": Layer(lambda: nn.GroupNorm(2, 4), (4, 2))},
    "BatchNorm1d": {
        "": Layer(lambda: nn.BatchNorm1d(2), (2, 3)),
        "own statistics": Layer(
            lambda: nn.BatchNorm1d(2, track_running_stats=False), (2, 3), refused="track_running_stats"
        ),
    },
    "BatchNorm2d": {"": Layer(lambda: nn.BatchNorm2d(2), (2, 2, 2))},
    "BatchNorm3d": {"": Layer(lambda: nn.BatchNorm3d(2), (2, 2, 1, 2))},
    "SyncBatchNorm": {"": Layer(lambda: nn.SyncBatchNorm(2), (2, 2, 2))},
    "InstanceNorm1d": {"": Layer(lambda: nn.InstanceNorm1d(2, affine=True), (2, 3))},
    "InstanceNorm2d": {
        "": Layer(lambda: nn.InstanceNorm2d(2, affine=True), (2, 2, 2)),
        "running": Layer(lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), (2, 2, 2)),
        "state alone": Layer(lambda: nn.InstanceNorm2d(2, track_running_stats=True), (2, 2, 2)),
    },
    "InstanceNorm3d": {"": Layer(lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 1, 2))},
    "PReLU": {"": Layer(nn.PReLU, (2, 3)), "per channel": Layer(lambda: nn.PReLU(2), (2, 3))},
    "RNNCell": {"": Layer(lambda: nn.RNNCell(3, 2), (3,), lambda m, x: m(x, m(x)))},
    "GRUCell": {"": Layer(lambda: nn.GRUCell(3, 2), (3,), lambda m, x: m(x, m(x)))},
    "LSTMCell": {"": Layer(lambda: nn.LSTMCell(3, 2), (3,), lambda m, x: m(x, m(x))[0])},
    "RNN": {
        "": Layer(lambda: nn.RNN(3, 2, batch_first=True), (2, 3), first),
        "batch second": Layer(lambda: nn.RNN(3, 2, nonlinearity="relu"), (2, 3), second),
    },
    "GRU": {"two": Layer(lambda: nn.GRU(3, 2, 2, batch_first=True, bidirectional=True), (2, 3), first)},
    "LSTM": {
        "": Layer(lambda: nn.LSTM(3, 2, batch_first=True, bias=False), (2, 3), first),
        "projected": Layer(lambda: nn.LSTM(3, 3, batch_first=True, proj_size=2), (2, 3), first),
    },
    "MultiheadAttention": {
        "": Layer(_attention(), (3, 4), itself),
        "no bias": Layer(_attention(bias=False), (3, 4), itself),
        "more keys": Layer(_attention(add_bias_kv=True, add_zero_attn=True), (3, 4), itself),
        "of a memory": Layer(_attention(), (3, 4), of_memory),
        "other widths": Layer(_attention(kdim=2, vdim=2), (3, 4), lambda m, x: m(x, x[..., :2], x[..., 2:])[0]),
        "batch second": Layer(lambda: nn.MultiheadAttention(4, 2), (3, 4), lambda m, x: second_of_three(m, x)),
    },
    "TransformerEncoderLayer": {
        "": Layer(_encoder, (2, 4)),
        "norm first": Layer(lambda: _encoder(norm_first=True, activation="gelu"), (2, 4)),
    },
    "TransformerEncoder": {"": Layer(lambda: nn.TransformerEncoder(_encoder(), 2), (2, 4))},
    "TransformerDecoderLayer": {
        "": Layer(lambda: nn.TransformerDecoderLayer(4, 2, 3, batch_first=True), (2, 4), other_memory)
    },
    "TransformerDecoder": {
        "": Layer(
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 1, 2, batch_first=True), 1),
            (2, 4),
            other_memory,
        )
    },
    "Transformer": {
        "": Layer(lambda: nn.Transformer(2, 1, 1, 1, 2, batch_first=True), (2, 2), lambda m, x: m(x, x.flip(1)))
    },
    "AdaptiveLogSoftmaxWithLoss": {
        "": Layer(lambda: nn.AdaptiveLogSoftmaxWithLoss(3, 5, [2], div_value=1), (3,), lambda m, x: m.log_prob(x))
    },
    "LinearCrossEntropyLoss": {
        "": Layer(lambda: nn.LinearCrossEntropyLoss(3, 2, bias=True, reduction="none"), (3,), for_every_class)
    },
    "ParameterList": {
        "": Layer(lambda: nn.ParameterList([torch.randn(3), torch.randn(3)]), (3,), lambda m, x: x * m[0] + m[1])
    },
    "ParameterDict": {"": Layer(lambda: nn.ParameterDict({"w": torch.randn(3, 3)}), (3,), lambda m, x: x @ m["w"])},
    "ModuleList": {"": Layer(lambda: nn.ModuleList([nn.Linear(3, 2)]), (3,), lambda m, x: m[0](x))},
    "ModuleDict": {"": Layer(lambda: nn.ModuleDict({"a": nn.Linear(3, 2)}), (3,), lambda m, x: m["a"](x))},
    "Sequential": {"": Layer(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()), (3,))},
    "DataParallel": {"": Layer(lambda: nn.DataParallel(nn.Linear(3, 2)), (3,))},
    "FractionalMaxPool2d": {
        "": Layer(lambda: nn.FractionalMaxPool2d(2, output_size=4), (1, 9, 9), refused="inner.*FractionalMaxPool2d")
    },
    "FractionalMaxPool3d": {
        "": Layer(lambda: nn.FractionalMaxPool3d(2, output_size=4), (1, 9, 9, 9), refused="inner.*FractionalMaxPool3d")
    },
}


def second_of_three(m, x):
    x = x.transpose(0, 1)
    return m(x, x, x)[0].transpose(0, 1)


LAZY = {  # how they are made, and the shape of an input
    "LazyLinear": (lambda: nn.LazyLinear(2), (3,)),
    "LazyConv1d": (lambda: nn.LazyConv1d(2, 2), (2, 3)),
    "LazyConv2d": (lambda: nn.LazyConv2d(2, 2), (2, 3, 3)),
    "LazyConv3d": (lambda: nn.LazyConv3d(2, 2), (1, 2, 2, 3)),
    "LazyConvTranspose1d": (lambda: nn.LazyConvTranspose1d(2, 2), (2, 3)),
    "LazyConvTranspose2d": (lambda: nn.LazyConvTranspose2d(2, 2), (2, 2, 2)),
    "LazyConvTranspose3d": (lambda: nn.LazyConvTranspose3d(2, 2), (1, 2, 1, 2)),
    "LazyBatchNorm1d": (nn.LazyBatchNorm1d, (2, 3)),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, (2, 2, 2)),
    "LazyBatchNorm3d": (nn.LazyBatchNorm3d, (2, 2, 1, 2)),
    "LazyInstanceNorm1d": (lambda: nn.LazyInstanceNorm1d(affine=True), (2, 3)),
    "LazyInstanceNorm2d": (lambda: nn.LazyInstanceNorm2d(affine=True), (2, 2, 2)),
    "LazyInstanceNorm3d": (lambda: nn.LazyInstanceNorm3d(affine=True), (2, 2, 1, 2)),
}

ABSTRACT = {"Module", "Container", "RNNBase", "RNNCellBase"}

ARGUMENTS = {  # of classes that cannot be made without, and have neither parameters nor state
    **dict.fromkeys((f"{kind}Pool{d}d" for kind in ("AdaptiveAvg", "AdaptiveMax", "Avg", "Max") for d in (1, 2, 3)), (2,)),
    **dict.fromkeys((f"LPPool{d}d" for d in (1, 2, 3)), (2, 2)),
    **dict.fromkeys((f"MaxUnpool{d}d" for d in (1, 2, 3)), (2,)),
    **dict.fromkeys((f"{kind}Pad{d}d" for kind in ("Circular", "Reflection", "Replication", "Zero") for d in (1, 2, 3)), (1,)),
    **dict.fromkeys((f"ConstantPad{d}d" for d in (1, 2, 3)), (1, 0.5)),
    "ChannelShuffle": (2,),
    "CrossMapLRN2d": (2,),
    "Fold": ((2, 2), 1),
    "LocalResponseNorm": (2,),
    "PixelShuffle": (2,),
    "PixelUnshuffle": (2,),
    "Threshold": (0.1, 0.2),
    "Unflatten": (1, (1, 1)),
    "Unfold": (1,),
}  # fmt: skip


def classes() -> dict[str, type[nn.Module]]:
    """Every module that ``torch.nn`` shows."""
    found = {name: value for name, value in vars(nn).items() if inspect.isclass(value)}
    return {name: value for name, value in found.items() if issubclass(value, nn.Module)}


def is_known(name: str, kind: type[nn.Module]) -> bool:
    """Whether a class is in a table, or is seen to have neither parameters nor state."""
    if name in LAYERS or name in LAZY or name in ABSTRACT:
        return True
    try:
        module = kind(*ARGUMENTS.get(name, ()))
    except TypeError:  # it takes arguments that nobody has given it
        return False
    return not any(True for _ in (*module.parameters(), *module.buffers()))
