"""Whether what a capture gives for single examples is what automatic differentiation gives, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from laplace.capture import contractions
from laplace.capture.agreement import allowed
from laplace.capture.blocks import Block
from laplace.capture.calls import by_layer
from laplace.capture.capture import Capture
from laplace.capture.fallback import dense, refusal
from laplace.capture.rules import is_outer, is_transposed
from laplace.linalg.precision import without_autocast
from laplace.noise import fixed_directions

PROBES = 8  # examples that are asked at most
_TINY = 1e-10  # size of a gradient from which on squares that float32 has not are far below what rounding may leave
_ALWAYS = 3  # of these, how many are asked even if the first ones have a gradient


@without_autocast()
def verdicts(capture: Capture, layers: dict[str, str], params: dict[str, nn.Parameter]) -> dict[str, list[bool | None]]:
    """For every parameter, whether each of the first examples has the captured gradient; None where there is none."""
    v = fixed_directions(capture.f)
    found: dict[str, list[bool | None]] = {name: [] for name in params}
    coarsest = capture.coarsest
    for number, example in enumerate(_order(min(len(v), PROBES))):
        if number >= _ALWAYS and all(set(asked) - {None} for asked in found.values()):
            break
        direction = torch.zeros_like(v)
        direction[example] = v[example]
        with _refusals(capture, params, direction):  # both by one backward pass
            gradients, truth = capture._pulled(direction, list(params.values()))
        own = by_layer(gradients)
        for (name, p), expected in zip(params.items(), truth, strict=True):
            expected = dense(expected, p).detach()
            block = Block(name, tuple(p.shape), layers[name], (), "")
            spacing = max(torch.finfo(expected.dtype).eps, coarsest)
            found[name].append(_is_row(capture, block, own.get(layers[name], []), expected, example, spacing))
    return found


def gradients_of(
    capture: Capture, params: dict[str, nn.Parameter], direction: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Those of automatic differentiation.

    Raises:
        ValueError: If it cannot differentiate the model with respect to a parameter; names it.
    """
    with _refusals(capture, params, direction):
        return _differentiated(capture, list(params.values()), direction)


@contextmanager
def _refusals(capture: Capture, params: dict[str, nn.Parameter], direction: torch.Tensor) -> Iterator[None]:
    """Name the parameters with respect to which a model cannot be differentiated, where that fails inside the block."""
    try:
        yield
    except RuntimeError as error:
        raise refusal(capture._model, [n for n, p in params.items() if _fails(capture, p, direction)], error) from error


def _differentiated(capture: Capture, params: list[nn.Parameter], direction: torch.Tensor):
    return torch.autograd.grad(capture._output, params, direction, retain_graph=True, allow_unused=True)


def _fails(capture: Capture, parameter: nn.Parameter, direction: torch.Tensor) -> bool:
    try:
        _differentiated(capture, [parameter], direction)
    except RuntimeError:
        return True
    return False


def _order(n: int) -> list[int]:
    """The last of so many examples, the first, the middle one, then the others."""
    return list(dict.fromkeys([n - 1, 0, n // 2, *range(n)]))


def _is_row(
    capture: Capture, block: Block, gradients: list[torch.Tensor], expected: torch.Tensor, example: int, spacing: float
) -> bool | None:
    """Whether one example's inputs and output gradients give this parameter's gradient; None if there is no gradient.

    An error means that they do not: the layer's class does something else with its inputs than its base class.

    Args:
        capture: Of the batch.
        block: The parameter.
        gradients: Of what came out of the calls of its layer.
        expected: The gradient by automatic differentiation.
        example: Number of the example.
        spacing: Of the coarsest numbers near 1 in all these.
    """
    if block.layer not in capture.called:
        return None
    try:
        g = capture.positions_of(block.layer, gradients)
        a = None if contractions.is_bias(block) else capture.inputs(block.layer)
        if len(g) != len(capture.f) or (a is not None and a.shape[:2] != g.shape[:2]):
            return False
        module, a, g = capture.modules[block.layer], None if a is None else a[example, None], g[example, None]
        if a is not None and _is_product(module, expected, a, g, spacing):
            return True
        ours = contractions.row_of_layer(block, module, a, g).flatten()
        size = torch.linalg.vector_norm(expected, dtype=torch.float64)
        error = ours.sub_(expected.flatten()).norm()
        if size > 0 and error <= allowed(size, size, torch.zeros_like(size), spacing):
            return True
        terms = _norms_of_terms(block, module, a, g)
    except (RuntimeError, ValueError, IndexError):
        return False
    if size == 0 and terms[0] == 0:
        return None
    return bool(error <= allowed(size, terms[1], terms[0], spacing))


def _is_product(module: nn.Module, expected: torch.Tensor, a: torch.Tensor, g: torch.Tensor, spacing: float) -> bool:
    """Whether a gradient is beyond doubt the outer product of one position's; False leaves that to a closer look.

    It is looked at in its own precision, several times as fast as in float64.
    """
    if g.shape[1] > 1 or not is_outer(module) or expected.dtype not in (torch.float32, torch.float64):
        return False
    size = a.norm() * g.norm()
    left, right = (side.flatten().to(expected.dtype) for side in ((a, g) if is_transposed(module) else (g, a)))
    error = torch.addr(expected.reshape(len(left), -1), left, right, alpha=-1).norm()
    return bool((size > _TINY) & (error <= allowed(size, size, size, spacing)))


def _norms_of_terms(
    block: Block, module: nn.Module, a: torch.Tensor | None, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the row of absolute values, and of that of root sums of squares, over the terms of the sum over positions."""
    if a is not None and g.shape[1] == 1 and is_outer(module):
        return (a.norm() * g.norm(),) * 2
    found = []
    for power in (1, 2):
        values = a if a is None or isinstance(module, nn.Embedding) else a.abs() ** power
        found.append(contractions.row_of_layer(block, module, values, g.abs() ** power) ** (1 / power))
    return found[0].norm(), found[1].norm()
