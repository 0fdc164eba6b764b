"""Basis: what the second pass is expressed in, found from the first window's sum by tasks, then committed at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from laplace.structures.specification import SumsSpec
from laplace_dist.plan.plan import Plan
from laplace_dist.run import bases, versions
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.combination import alone
from laplace_dist.run.layout import attempt_prefix, basis_key
from laplace_dist.run.windows import read_window
from laplace_dist.stages.context import Context

WORTH = 1024.0**3  # cost of what one task finds, in cubed widths: half a second's work


@dataclass(frozen=True)
class FindBasis:
    """Find some arrays of the basis and write them; `bases.commit_basis` refers to them.

    Attributes:
        plan: Digest of the plan.
        names: Of the arrays.
    """

    plan: str
    names: tuple[str, ...]

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"basis {self.names[0]}" + (", …" if len(self.names) > 1 else "")

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has `prefix` and `entry` of each array by name, under `factors`."""
        store, plan = context.store, context.plan
        law, spec, parts = bases.law_of(plan), SumsSpec.from_json(plan.spec), bases.parts_of(plan)
        (term,) = alone(store, plan, read_window(store, plan))
        arrays = {}
        for name in self.names:
            factors = versions.factors_of([term], parts[name].factors)
            tensors = {factor: torch.from_numpy(array).to(context.device) for factor, array in factors.items()}
            arrays[name] = law.find(spec, name, tensors, term.manifest["n_data"]).cpu().contiguous().numpy()
        prefix = attempt_prefix(basis_key(plan.further["name"]), new_attempt())
        found = store.write_arrays(prefix, arrays)
        return {"factors": {name: {"prefix": prefix, "entry": entry} for name, entry in found.items()}}


def tasks(plan: Plan) -> list[FindBasis]:
    """Return tasks for the whole basis, what costs most first: that alone, the rest together."""
    costs = {name: part.cost for name, part in bases.parts_of(plan).items()}
    groups: list[list[str]] = []
    held = WORTH
    for name in sorted(costs, key=lambda name: -costs[name]):
        if held + costs[name] > WORTH:
            groups.append([])
            held = 0.0
        groups[-1].append(name)
        held += costs[name]
    return [FindBasis(plan.digest, tuple(group)) for group in groups]
