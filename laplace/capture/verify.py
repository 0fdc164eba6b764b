"""Which parameter's curvature comes from where, decided once and checked against automatic differentiation.

A parameter is *covered* when it belongs to one module of a known kind and reaches the output through that module's calls
alone. Tied weights, re-parametrised weights and weights used outside their module fail that test; they, and layers of other
kinds, fall back to per-example automatic differentiation. Nothing is skipped in silence: :class:`CoverageReport` says what
was decided for every parameter and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from laplace.capture import contractions
from laplace.capture.blocks import Block
from laplace.capture.capture import Capture
from laplace.capture.rules import is_covered, is_outer, is_transposed
from laplace.noise import fixed_directions


class Source(NamedTuple):
    """Where a parameter's curvature comes from.

    Attributes:
        layer: Name of the module whose capture gives it, or None.
        reason: In words.
        kind: ``'outer'``, ``'transposed'`` or ``'rows'``; see :mod:`laplace.capture.rules`.
    """

    layer: str | None
    reason: str
    kind: str = "outer"


def find_layers(model: nn.Module, names: Sequence[str], x: Any) -> dict[str, Source]:
    """Decide for each parameter which module covers it.

    Args:
        model: The network in evaluation mode.
        names: Parameters with ``requires_grad``, in order.
        x: One batch, used to compare captured gradients with automatic differentiation.

    Returns:
        The source of every parameter's curvature by name.
    """
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module_name, key))
    known = dict(model.named_parameters())
    found: dict[str, Source] = {}
    for name in names:
        places = owners[id(known[name])]
        module = model.get_submodule(places[0][0])
        if len(places) > 1:
            tied = ", ".join(".".join(p) for p in places)
            found[name] = Source(None, f"per-example autograd: tied weight ({tied})")
        elif not is_covered(module) or places[0][1] not in ("weight", "bias"):
            found[name] = Source(None, f"per-example autograd: {type(module).__name__}")
        else:
            kind = "transposed" if is_transposed(module) else "outer" if is_outer(module) else "rows"
            found[name] = Source(places[0][0], type(module).__name__, kind)
    return _verified(model, found, x)


def _verified(model: nn.Module, found: dict[str, Source], x: Any) -> dict[str, Source]:
    """Take out parameters whose captured gradient is not their gradient.

    The direction is zero but for one example, and only that example's row of the capture may answer for it. So a layer that
    sees the batch in another dimension than the first fails as well.
    """
    layers = list(dict.fromkeys(source.layer for source in found.values() if source.layer is not None))
    if not layers:
        return found
    names = [name for name, source in found.items() if source.layer is not None]
    known = dict(model.named_parameters())
    capture = Capture(model, x, layers, dtype=torch.float64)
    if not capture._output.requires_grad:
        raise ValueError("The model's output does not depend on any of its parameters with requires_grad=True.")
    capture.check_called()
    v = fixed_directions(capture.f)
    v[:-1] = 0
    truth = torch.autograd.grad(capture._output, [known[n] for n in names], v, retain_graph=True, allow_unused=True)
    gradients = capture.gradients(v)
    result = dict(found)
    for name, expected in zip(names, truth, strict=True):
        layer = found[name].layer
        expected = torch.zeros_like(known[name]) if expected is None else expected.detach()
        if layer not in capture.called:
            result[name] = Source(None, "per-example autograd: its module did not run")
        elif not _is_row(
            capture, Block(name, tuple(expected.shape), layer, (), ""), gradients[layer], expected, len(v)
        ):
            reason = "per-example autograd: used outside its module's calls, or batch not in the first dimension"
            result[name] = Source(None, reason)
    return result


def _is_row(capture: Capture, block: Block, g: torch.Tensor, expected: torch.Tensor, n: int) -> bool:
    """Whether the last example's inputs and output gradients give this parameter's gradient."""
    a = None if contractions.is_bias(block) else capture.inputs(block.layer)
    if len(g) != n or (a is not None and a.shape[:2] != g.shape[:2]):
        return False
    module, a, g = capture.modules[block.layer], None if a is None else a[-1:], g[-1:]
    ours = contractions.row_of_layer(block, module, a, g)
    terms = contractions.row_of_layer(
        block, module, None if a is None else a.abs(), g.abs()
    )  # what may cancel in the sum
    error = (expected.double().flatten() - ours.flatten()).norm()
    tolerance = min(1e3 * torch.finfo(expected.dtype).eps, 0.05)
    return bool(error <= tolerance * (torch.maximum(expected.double().norm(), terms.norm()) + 1e-30))
