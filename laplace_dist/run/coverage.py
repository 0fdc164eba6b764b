"""What was decided for every parameter of the model: a summary for the job's output, the long list in a file of the run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from laplace.structures.registry import coverage_report
from laplace.structures.specification import SumsSpec
from laplace_dist.errors import CheckpointError, MissingObjectError
from laplace_dist.plan.plan import Plan
from laplace_dist.run.layout import COVERAGE, remedy
from laplace_dist.run.settings_file import is_sealed_yaml, seal_yaml
from laplace_dist.storage.store import Store

KINDS = {
    "kron": "Kronecker factors",
    "diag": "diagonal",
    "blockdiag": "full matrix of its layer",
    "full": "full matrix",
    "lowrank": "low rank",
    "map": "MAP value alone",
}
_HEADER = ("parameter", "kind", "weights", "why")


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        parameter: Its name.
        kind: How its curvature is kept, a key of `KINDS`; `map` where it stays at its value, without uncertainty.
        weights: Number of its entries that this is said of.
        why: The reason.
    """

    parameter: str
    kind: str
    weights: int
    why: str


@dataclass(frozen=True)
class Share:
    """Parameters of one kind: how many tensors, and which share of all weights they hold."""

    kind: str
    tensors: int
    weights: int
    share: float


def rows_of(spec: SumsSpec, model: nn.Module | None = None) -> list[Row]:
    """Return a row for every parameter: those with curvature in order, then the others, which a model is needed to know.

    Args:
        spec: Of the sums.
        model: The network.
    """
    sizes = {block.parameter: block.size for block in spec.blocks}
    rows = [Row(name, kind, sizes[name], why) for name, kind, why in coverage_report(spec)]
    named = dict(model.named_parameters(remove_duplicate=False)) if model is not None else {}
    covered = {id(named[name]): size for name, size in sizes.items() if name in named}  # tied ones have several names
    for name, parameter in model.named_parameters() if model is not None else ():
        left = parameter.numel() - covered.get(id(parameter), 0)
        if left:
            why = "not among the weights that are uncertain" if parameter.requires_grad else "requires_grad=False"
            rows.append(Row(name, "map", left, why))
    return rows


def summary(rows: Sequence[Row]) -> list[Share]:
    """Return how many tensors there are of each kind, and which share of the weights, the largest share first."""
    total = sum(row.weights for row in rows) or 1
    found = []
    for kind in dict.fromkeys(row.kind for row in rows):
        some = [row for row in rows if row.kind == kind]
        weights = sum(row.weights for row in some)
        found.append(Share(kind, len(some), weights, weights / total))
    return sorted(found, key=lambda share: -share.weights)


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the summary for people, one line per kind."""
    shares = summary(rows)
    cells = [
        (
            KINDS[share.kind],
            f"{share.tensors:,}",
            "tensor" if share.tensors == 1 else "tensors",
            f"{share.weights:,}",
            f"{share.share:.1%}",
        )
        for share in shares
    ]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"coverage: {kind:<{wide[0]}}  {count:>{wide[1]}} {unit:<{wide[2]}}  {weights:>{wide[3]}} weights  {share:>{wide[4]}}"
        for kind, count, unit, weights, share in cells
    ]


def write_coverage(store: Store, rows: Sequence[Row]) -> str:
    """Write the long list, tab-separated, and return where it is."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows((row.parameter, row.kind, row.weights, row.why) for row in rows)
    store.replace(COVERAGE, seal_yaml(text.getvalue()))
    return f"{store.url.rstrip('/')}/{COVERAGE}"


def check_coverage(store: Store) -> None:
    """Look whether the long list is as it was written.

    Raises:
        CheckpointError: It is missing, truncated or altered.
    """
    if not is_sealed_yaml(store.read(COVERAGE)):
        raise CheckpointError(
            f"{COVERAGE} is truncated or altered: its content does not have the sha256 in it. {remedy(COVERAGE)}"
        )


def read_coverage(store: Store, plan: Plan) -> list[Row]:
    """Return the long list; of a run that has none, or whose list was altered, what its plan says."""
    try:
        content = store.read(COVERAGE)
    except MissingObjectError:
        content = b""
    if is_sealed_yaml(content):
        _, *rows, _ = csv.reader(io.StringIO(content.decode()), delimiter="\t")
        return [Row(name, kind, int(weights), why) for name, kind, weights, why in rows]
    return rows_of(SumsSpec.from_json(plan.spec))
