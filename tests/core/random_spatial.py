"""Layers of random models on signals, images and volumes ``(channels, …)``; see :mod:`tests.core.random_features`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .random_features import LAYERS, RIGHT, Block, Feature, layer, parameter


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
