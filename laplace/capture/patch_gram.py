r"""Sums of outer products of a convolution's patches from those of its input's pixels, without the patches.

With a stride of one, two entries of a patch are two pixels a fixed lag apart, whatever the place of the patch. Were there a
patch at every place, :math:`\sum_p x_{p+j} x_{p+k}^\top` would be the lagged product :math:`S_{k-j}` of the input with itself:
of the 81 blocks of a kernel of 3 × 3 there are 25, of which 13 have to be computed, a third of what half of all takes. What the
patches outside of the output would add, which lie across the input's edge, is taken off; each has few rows of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace.capture.geometry import Geometry
from laplace.linalg.gram import BLOCK, add_gram_of_positions_, mirror_
from laplace.linalg.lags import lagged_products, products
from laplace.linalg.memory import ranges

_CHUNK = 1 << 20  # elements of what is held besides sums: small enough to stay in a cache
_NARROWEST = 300  # columns of the product of a run at all lags, from which on it is worth its call
_HALF = 0.6  # of a symmetric product that is computed
_SPREADING = 100  # multiplications that one entry of the sum costs, when it is added to
_WORTH = 1.7  # times fewer multiplications, since they are of narrower matrices


@dataclass(frozen=True)
class _Edge:
    """Patches outside of the output at one place along an axis.

    Attributes:
        axis: Which.
        pixels: Where along it they have pixels.
        kept: Which of their entries along it these are.
        geometry: Of what they are patches of: the input at these pixels.
    """

    axis: int
    pixels: slice
    kept: slice
    geometry: Geometry


def pays(geometry: Geometry, x: Tensor) -> bool:
    """Whether the sum over patches of inputs ``(batch, channels, …)`` is cheaper by lagged products, by their shapes alone.

    Only of convolutions that give no fewer pixels than they are given: of others, too little is left of what edges take off.
    """
    sizes = x.shape[2:]
    widens = all(sum(pair) >= extra for pair, extra in zip(geometry.padding, _room(geometry), strict=True))
    if set(geometry.stride) != {1} or geometry.mode != "zeros" or not widens:
        return False
    if x.device.type != "cpu" or x.shape[1] * products(_reach(geometry)) < _NARROWEST:
        return False
    entries = torch.Size(geometry.kernel).numel()
    plain = _HALF * entries**2 * len(x) * geometry.positions(sizes)
    sides = (size + extra for size, extra in zip(sizes, _room(geometry), strict=True))
    lagged = len(x) * torch.Size(sides).numel() * products(_reach(geometry)) + _SPREADING * entries**2
    for edge in _edges(geometry, sizes):
        cut = [*sizes]
        cut[edge.axis] = edge.geometry.kernel[edge.axis]
        lagged += _HALF * len(x) * edge.geometry.positions(cut) * torch.Size(edge.geometry.kernel).numel() ** 2
    return _WORTH * lagged < plain


def add_gram_of_patches_(total: Tensor, x: Tensor, geometry: Geometry, scale: float) -> None:
    """Add ``scale · Σ patchᵀ patch``, as :func:`laplace.linalg.gram.add_gram_of_positions_` does of all patches.

    Args:
        total: The symmetric float64 sum ``(channels · kernel, channels · kernel)``, or some of its rows.
        x: Inputs ``(batch, channels, …)``.
        geometry: Of a convolution with a stride of one that pads by zeros.
        scale: Factor.
    """
    lags = lagged_products(x, _reach(geometry), geometry.dilation)
    edges = [(edge, _gram(edge, x)) for edge in _edges(geometry, x.shape[2:])]
    _spread_(total, lags, edges, geometry.kernel, scale)


def _reach(geometry: Geometry) -> list[int]:
    """The largest lag between two entries of a patch along every axis, in steps of the dilation."""
    return [size - 1 for size in geometry.kernel]


def _room(geometry: Geometry) -> list[int]:
    """The same in pixels."""
    return [(size - 1) * step for size, step in zip(geometry.kernel, geometry.dilation, strict=True)]


def _edges(geometry: Geometry, sizes: Sequence[int]) -> Iterator[_Edge]:
    """Every place outside of the output at which patches have pixels; at a corner it is outside along the first such axis."""
    room = _room(geometry)
    for axis, (size, kernel, step) in enumerate(zip(sizes, geometry.kernel, geometry.dilation, strict=True)):
        before, after = geometry.padding[axis]
        end = size + before + after - room[axis]
        padding = [*geometry.padding[:axis], (0, 0), *((extra, extra) for extra in room[axis + 1 :])]
        for place in (*range(before - room[axis], 0), *range(end, size + before)):
            kept = [entry for entry in range(kernel) if 0 <= place + entry * step - before < size]
            if not kept:
                continue
            first = place + kept[0] * step - before
            cut = replace(
                geometry,
                kernel=(*geometry.kernel[:axis], len(kept), *geometry.kernel[axis + 1 :]),
                dilation=(*geometry.dilation[:axis], 1, *geometry.dilation[axis + 1 :]),
                padding=tuple(padding),
            )
            pixels = slice(first, first + (len(kept) - 1) * step + 1, step)
            yield _Edge(axis, pixels, slice(kept[0], kept[-1] + 1), cut)


def _gram(edge: _Edge, x: Tensor) -> Tensor:
    """The sum over the patches at an edge, float64, ``(channels, …, channels, …)`` with the axes of the kernel."""
    x = x[(slice(None),) * (2 + edge.axis) + (edge.pixels,)]
    channels, kernel = x.shape[1], edge.geometry.kernel
    width = channels * torch.Size(kernel).numel()
    total = torch.zeros(width, width, dtype=torch.float64)
    for start, stop in ranges(len(x), edge.geometry.positions(x.shape[2:]) * width, _CHUNK):
        add_gram_of_positions_(total, [edge.geometry.patches(x[start:stop])])
    mirror_(total)
    return total.view(channels, *kernel, channels, *kernel)


def _spread_(
    total: Tensor, lags: Tensor, edges: list[tuple[_Edge, Tensor]], kernel: tuple[int, ...], scale: float
) -> None:
    """Add what the lags say of every pair of a patch's entries, less the edges, to a sum, some channels at a time."""
    channels, axes = lags.shape[-1], len(kernel)
    entries = torch.Size(kernel).numel()
    last = total.shape[1]
    first = last - total.shape[0]
    numbers = _numbers_of_lags(kernel).flatten()
    lags = lags.flatten(0, axes - 1)
    for start, stop in ranges(channels, channels * entries**2, _CHUNK):
        top, bottom = max(first, start * entries), min(last, stop * entries)
        if top >= bottom:
            continue
        to = min(channels, -(-min(last, -(-bottom // BLOCK) * BLOCK) // entries))  # all columns of the last row's block
        pairs = lags[:, start:stop, :to].index_select(0, numbers).view(entries, entries, stop - start, to)
        pairs = pairs.permute(2, 0, 3, 1).contiguous().view(stop - start, *kernel, to, *kernel)
        for edge, gram in edges:
            inside = [slice(None)] * (2 * axes + 2)
            inside[1 + edge.axis] = inside[2 + axes + edge.axis] = edge.kept
            pairs[tuple(inside)] -= gram[start:stop].narrow(1 + axes, 0, to)
        block = pairs.view((stop - start) * entries, to * entries)[top - start * entries : bottom - start * entries]
        columns = min(last, to * entries)
        total[top - first : bottom - first, :columns].add_(block[:, :columns], alpha=scale)


def _numbers_of_lags(kernel: tuple[int, ...]) -> Tensor:
    """The number of the lag from each of a kernel's entries to each other."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in kernel)).view(-1, len(kernel))
    lag = places - places[:, None] + torch.tensor([size - 1 for size in kernel])
    sides = [2 * size - 1 for size in kernel]
    strides = torch.tensor([torch.Size(sides[axis + 1 :]).numel() for axis in range(len(sides))])
    return (lag * strides).sum(-1)
