"""The structures that are sums, by name: what they add up, in how many passes, and what was decided for every parameter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from laplace.capture.products import product_of
from laplace.capture.rules import is_outer
from laplace.capture.verify import UNSHOWN, Source
from laplace.linalg.precision import without_autocast
from laplace.structures import blockdiag, diag, ekfac, full, kron, sketch, subnetwork
from laplace.structures.second_pass import SecondPass
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums

_STRUCTURES = {"full": full, "diag": diag, "kron": kron, "ekfac": ekfac, "blockdiag": blockdiag}
_ADD = {
    **{name: module.add_ for name, module in _STRUCTURES.items()},
    sketch.SKETCH: sketch.add_sketch_,
    sketch.CORE: sketch.add_core_,
}
# By the structure of the posterior:
SECOND_PASSES: dict[str, SecondPass] = {"lowrank": sketch.SECOND_PASS, "ekfac": ekfac.SECOND_PASS}


def sums_spec(
    structure: str,
    shapes: dict[str, tuple[int, ...]],
    found: Mapping[str, tuple[str | None, str]],
    dtype: torch.dtype,
    n_outputs: int,
    kept: dict[str, tuple[int, ...] | None] | None = None,
    bare: bool = False,
) -> SumsSpec:
    """Names and shapes of the sums of one structure.

    ``kept`` are the entries of every parameter, None for all; a ``bare`` model has no modules, so that it is one layer.
    """
    found = {name: Source(*source) for name, source in found.items()}
    if any(chosen is not None for chosen in (kept or {}).values()):
        blocks, factors = subnetwork.blocks_of(structure, shapes, found, kept)
    elif structure == "blockdiag":
        blocks, factors = blockdiag.blocks_of(shapes, found, bare)
    else:
        blocks, factors = _STRUCTURES[structure].blocks_of(shapes, found)
    return SumsSpec(structure, tuple(blocks), factors, str(dtype).removeprefix("torch."), n_outputs)


@without_autocast()
def add_curvature_(
    sums: CurvatureSums,
    capture,
    directions: Iterator[Tensor],
    reduce: bool = False,
    weights: Tensor | None = None,
) -> None:
    """Add one batch's curvature along the given output directions to the sums, in place.

    Rows and their products are of the capture's type, the running sums of float64: small contributions do not vanish in
    large sums. ``reduce`` and ``weights`` are for Kronecker factors alone, see :mod:`laplace.structures.kron`.
    """
    if sums.spec.structure == "kron":
        kron.add_(sums, capture, directions, reduce, weights)
    else:
        _ADD[sums.spec.structure](sums, capture, directions)


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
        kind = spec.structure.partition("-")[0]  # of the passes of a structure, that structure
        if (kind == "kron" and not block.has_factors) or (kind == "ekfac" and not block.basis):
            kind = "diag"
        rows.append((block.parameter, kind, block.reason))
    return rows


def warn_of_diagonal_blocks(spec: SumsSpec, model: nn.Module) -> None:
    """Say which weights of linear layers and convolutions get a diagonal block where Kronecker factors are asked for."""
    if spec.structure != "kron":
        return
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False) if is_outer(module)}
    known: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    missing = []
    for parameter, kind, reason in coverage_report(spec):
        own = parameter.removeprefix(".")  # of a model that is its own last layer
        factored = id(known[own]) in owners or product_of(model, own) is not None
        if kind == "diag" and (factored or UNSHOWN in reason):
            missing.append(f"{parameter} ({reason})")
    if missing:
        warnings.warn(
            f"No Kronecker factors, but a diagonal block, for {'; '.join(missing)}. Evidence and tuned priors differ from "
            "those with factors. hessian_structure='full' or 'diag' treat all parameters alike.",
            stacklevel=3,
        )
