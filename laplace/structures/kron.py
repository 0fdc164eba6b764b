r"""Kronecker factors: :math:`\tfrac1R \sum_r a a^\top` and :math:`\sum_r g g^\top` of every layer.

This is KFAC-expand (Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures",
NeurIPS 2023). KFAC-reduce of the same paper first takes the mean of the inputs and the sum of the output gradients over the
positions of an example, then one outer product of each. Padded tokens are no positions, see :mod:`laplace.capture.padding`.
Parameters without factors get a diagonal block. The one division, by the number of examples, is in
:meth:`laplace.linalg.kronecker.Kron.from_sums`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from laplace.capture.blocks import Block
from laplace.capture.padding import position_weights
from laplace.capture.patch_gram import add_gram_of_patches_, pays
from laplace.capture.rules import patches_of
from laplace.data.example_weights import along
from laplace.linalg.gram import add_gram_of_positions_, is_small
from laplace.linalg.kronecker import weight_shape_2d
from laplace.linalg.memory import at_once
from laplace.structures.diag import add_square_of_row_
from laplace.structures.specification import Factor
from laplace.structures.sums import CurvatureSums

_PATCHES = 1 << 20  # elements of a chunk of layer inputs: small enough to stay in a cache
_ROWS = 4096  # rows of several directions that are added together: large sums are read and written less often


def blocks_of(shapes, found):
    """The bias of a layer shares the output factor of its weight: both are the sum of the same outer products."""
    blocks: list[Block] = []
    factors: dict[str, Factor] = {}
    left: dict[str, str] = {}
    for name, shape in shapes.items():
        layer, reason, kind, *_ = found[name]
        if layer is None or kind == "rows":
            blocks.append(Block(name, shape, layer, (f"{name}/diag",), reason + "; diagonal block"))
            factors[f"{name}/diag"] = Factor(shape)
            continue
        out, rest = weight_shape_2d(shape) if kind == "outer" else reversed(weight_shape_2d(shape))
        if len(shape) == 1:
            out = shape[0]
        if layer not in left:
            left[layer] = f"{name}/B"
            factors[left[layer]] = Factor((out, out), symmetric=True)
        names = (left[layer],)
        if len(shape) > 1:
            names = (f"{name}/A", *names) if kind == "transposed" else (*names, f"{name}/A")
            factors[f"{name}/A"] = Factor((rest, rest), symmetric=True)
        blocks.append(Block(name, shape, layer, names, reason))
    return blocks, factors


def add_(
    sums: CurvatureSums,
    capture,
    directions: Iterator[Tensor],
    reduce: bool = False,
    weights: Tensor | None = None,
) -> None:
    r"""Add the Gram matrices of one batch, by KFAC-reduce or expand, and the squared rows of parameters without factors.

    Directions bring the weights of their examples with them; for inputs, :math:`\sum_n w_n a_n a_n^\top`, they are given.
    """
    factored = [block for block in sums.spec.blocks if block.has_factors]
    held = {name: block.layer for block in factored for name in block.factors if sums.holds(name)}
    inputs = {name: layer for name, layer in held.items() if name.endswith("/A")}
    outputs = {name: layer for name, layer in held.items() if name.endswith("/B")}
    diagonal = [block for block in sums.held_blocks if not block.has_factors]
    waiting: dict[str, list[Tensor]] = {name: [] for name in outputs}
    gradients: dict[str, Tensor] = {}
    for number, v in enumerate(directions):
        gradients = capture.gradients(v)
        if number == 0:
            _add_inputs(sums, capture, inputs, gradients, reduce, weights)
        if not outputs and not diagonal:  # nothing that is held needs further directions
            break
        for name, layer in outputs.items():
            g = gradients[layer]
            waiting[name].append(g.sum(1, keepdim=True) if reduce else g)
            if sum(g.shape[0] * g.shape[1] for g in waiting[name]) >= _ROWS:
                add_gram_of_positions_(sums.running(name), waiting[name])
                waiting[name] = []
        for block in diagonal:
            add_square_of_row_(sums, block, gradients, capture, v)
    if not gradients:
        _add_inputs(sums, capture, inputs, gradients, reduce, weights)
    for name, rest in waiting.items():
        add_gram_of_positions_(sums.running(name), rest)


def _add_patches(total: Tensor, capture, layer: str, example_weights: Tensor | None) -> bool:
    """Add the Gram matrix of a convolution's patches without making them; False where that is no cheaper."""
    geometry = patches_of(capture.modules[layer])
    if geometry is None or is_small(total) or (x := capture.single_input(layer)) is None:
        return False
    if x.ndim != 2 + len(geometry.kernel) or not pays(geometry, x):
        return False
    if example_weights is not None:
        x = along(example_weights.sqrt(), x) * x
    add_gram_of_patches_(total, x, geometry, 1.0 / geometry.positions(x.shape[2:]))
    return True


def _add_inputs(
    sums: CurvatureSums,
    capture,
    inputs: dict[str, str],
    gradients: dict[str, Tensor],
    reduce: bool,
    example_weights: Tensor | None,
) -> None:
    """Add the Gram matrices of the inputs, of which those at padded tokens do not count; ``gradients`` tell these."""
    for name, layer in inputs.items():
        start, g = 0, gradients.get(layer)
        weights = None if g is None else position_weights(capture.kept_tokens, g.shape[1], g)
        if not reduce and weights is None and _add_patches(sums.running(name), capture, layer, example_weights):
            continue
        several = max(at_once(_PATCHES, capture.f.device), _ROWS // 2 * sums.running(name).shape[1])
        for a in capture.input_chunks(layer, several):
            w = None if weights is None else weights[start : start + len(a), :, None].to(a.dtype)
            if example_weights is not None:
                a = along(example_weights[start : start + len(a)].sqrt(), a) * a
            start += len(a)
            if reduce:
                a = a.mean(1, keepdim=True) if w is None else (w * a).sum(1, keepdim=True)
                add_gram_of_positions_(sums.running(name), [a])
            elif w is None:
                add_gram_of_positions_(sums.running(name), [a], 1.0 / a.shape[1])
            else:
                add_gram_of_positions_(sums.running(name), [w.sqrt() * a])
