"""Which parameter's curvature comes from where, decided once and checked against automatic differentiation.

A parameter is *covered* when it belongs to one module of a known kind and reaches the output through that module's calls
alone. Tied weights, re-parametrised weights and weights used outside their module fail that test; they, and layers of other
kinds, fall back to per-example automatic differentiation. Nothing is skipped in silence: :class:`CoverageReport` says what
was decided for every parameter and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from laplace.curvature.capture import Capture
from laplace.curvature.layers import is_covered, weight_shape_2d
from laplace.curvature.sums import Block, Factor, SumsSpec


class CoverageReport(list):
    """Rows ``(parameter, structure, reason)``; prints as a table."""

    def __str__(self) -> str:
        """One aligned line per parameter."""
        if not self:
            return "no parameters"
        widths = [max(len(str(row[i])) for row in self) for i in (0, 1)]
        return "\n".join(f"{p:<{widths[0]}}  {s:<{widths[1]}}  {r}" for p, s, r in self)


def coverage_report(spec: SumsSpec) -> CoverageReport:
    """The treatment of every parameter, read off the specification of the sums."""
    rows = CoverageReport()
    for block in spec.blocks:
        kind = spec.structure
        if kind == "kron" and block.layer is None and block.factors[0].endswith("/diag"):
            kind = "diag"
        rows.append((block.parameter, kind, block.reason))
    return rows


def find_layers(model: nn.Module, names: Sequence[str], x: Any) -> dict[str, tuple[str | None, str]]:
    """Decide for each parameter which module covers it.

    Args:
        model: The network in evaluation mode.
        names: Parameters with ``requires_grad``, in order.
        x: One batch, used to compare captured gradients with automatic differentiation.

    Returns:
        ``(module name or None, reason)`` by parameter.
    """
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module_name, key))
    known = dict(model.named_parameters())
    found: dict[str, tuple[str | None, str]] = {}
    for name in names:
        places = owners[id(known[name])]
        module = model.get_submodule(places[0][0])
        if len(places) > 1:
            tied = ", ".join(".".join(p) for p in places)
            found[name] = (None, f"per-example autograd: tied weight ({tied})")
        elif not is_covered(module) or places[0][1] not in ("weight", "bias"):
            found[name] = (None, f"per-example autograd: {type(module).__name__}")
        else:
            found[name] = (places[0][0], type(module).__name__)
    return _verified(model, found, x)


def _verified(model: nn.Module, found: dict[str, tuple[str | None, str]], x: Any) -> dict[str, tuple[str | None, str]]:
    """Take out parameters whose captured gradient is not their gradient."""
    layers = list(dict.fromkeys(layer for layer, _ in found.values() if layer is not None))
    if not layers:
        return found
    names = [name for name, (layer, _) in found.items() if layer is not None]
    known = dict(model.named_parameters())
    capture = Capture(model, x, layers, dtype=torch.float64)
    if not capture._output.requires_grad:
        raise ValueError("The model's output does not depend on any of its parameters with requires_grad=True.")
    v = torch.randn(capture.f.shape, generator=torch.Generator().manual_seed(0)).to(capture.f)
    truth = torch.autograd.grad(
        capture._output, [known[n] for n in names], v, retain_graph=True, allow_unused=True
    )
    gradients = capture.gradients(v)
    result = dict(found)
    for name, expected in zip(names, truth, strict=True):
        layer, _ = found[name]
        if expected is None:
            expected = torch.zeros_like(known[name])
        if layer in capture.called:
            g = gradients[layer]
            ours = g.sum((0, 1)) if known[name].ndim == 1 else torch.einsum("nro,nri->oi", g, capture.inputs(layer))
        else:
            ours = torch.zeros(())
        error = (expected.detach().double().flatten() - ours.flatten()).norm()
        relative = min(1e3 * torch.finfo(known[name].dtype).eps, 0.05)
        tolerance = relative * (expected.double().norm() + 1e-30)
        if error > tolerance:
            result[name] = (None, "per-example autograd: used outside its module's calls")
        elif layer not in capture.called:
            result[name] = (None, "per-example autograd: its module did not run")
    return result


def sums_spec(
    structure: str,
    shapes: dict[str, tuple[int, ...]],
    found: dict[str, tuple[str | None, str]],
    dtype: torch.dtype,
    n_outputs: int,
) -> SumsSpec:
    """Names and shapes of the sums of one structure."""
    build = {"full": _full_blocks, "diag": _diag_blocks, "kron": _kron_blocks}[structure]
    blocks, factors = build(shapes, found)
    return SumsSpec(structure, tuple(blocks), factors, str(dtype).removeprefix("torch."), n_outputs)


def _full_blocks(shapes, found):
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    blocks = [Block(n, s, found[n][0], ("full",), found[n][1]) for n, s in shapes.items()]
    return blocks, {"full": Factor((size, size), symmetric=True)}


def _diag_blocks(shapes, found):
    blocks = [Block(n, s, found[n][0], (f"{n}/diag",), found[n][1]) for n, s in shapes.items()]
    return blocks, {f"{n}/diag": Factor(s) for n, s in shapes.items()}


def _kron_blocks(shapes, found):
    """The bias of a layer shares the output factor of its weight: both are the sum of the same outer products."""
    blocks: list[Block] = []
    factors: dict[str, Factor] = {}
    left: dict[str, str] = {}
    for name, shape in shapes.items():
        layer, reason = found[name]
        if layer is None:
            blocks.append(Block(name, shape, None, (f"{name}/diag",), reason + "; diagonal block"))
            factors[f"{name}/diag"] = Factor(shape)
            continue
        out, rest = weight_shape_2d(shape)
        if layer not in left:
            left[layer] = f"{name}/B"
            factors[left[layer]] = Factor((out, out), symmetric=True)
        names = (left[layer],)
        if len(shape) > 1:
            names += (f"{name}/A",)
            factors[f"{name}/A"] = Factor((rest, rest), symmetric=True)
        blocks.append(Block(name, shape, layer, names, reason))
    return blocks, factors
