"""Reduce: the partials summed part by part, then the factors of the posterior version taken from the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import Plan
from laplace_dist.run import partials, versions, windows
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.provenance import environment
from laplace_dist.stages.context import Context
from laplace_dist.storage.store import Store

GROUP_BYTES = 32 * 2**20  # of small factors that one task writes together


@dataclass(frozen=True)
class SumPart:
    """Add one part of every partial in plan order, in float64, and commit it under a manifest of its own.

    Attributes:
        plan: Digest of the plan.
        part: The part.
        of: What it is the sum of: `windows.inputs_digest`.
    """

    plan: str
    part: Part
    of: str

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"sum of part {self.part.id}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so."""
        store, plan = context.store, context.plan
        manifests = [partials.of_part(manifest, self.part) for manifest in partials.manifests(store, plan)]
        total = windows.sum_part(store, plan, manifests, self.part)
        windows.commit_part(store, plan, self.part, total, self.of, environment(context.device))
        return {}


@dataclass(frozen=True)
class WriteFactors:
    """Take some factors from the window's sum and write them by name; `versions.commit_version` refers to them.

    Attributes:
        plan: Digest of the plan.
        version: Name of the posterior version.
        names: Of the factors.
    """

    plan: str
    version: str
    names: tuple[str, ...]

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"factors {self.names[0]}, …"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has `prefix` and `entry` of each array by name, under `factors`."""
        store, plan = context.store, context.plan
        arrays = versions.factors_of(store, plan, windows.read_window(store, plan), self.names)
        symmetric = {name for name in self.names if plan.spec["factors"][name]["symmetric"]}
        prefix = f"posteriors/{self.version}/{new_attempt()}"
        entries = store.write_arrays(prefix, arrays, symmetric)
        return {"factors": {name: {"prefix": prefix, "entry": entry} for name, entry in entries.items()}}


def part_tasks(store: Store, plan: Plan, manifests: Sequence[Mapping[str, Any]]) -> list[SumPart]:
    """Return a task for every part that has no sum of these partials."""
    return [SumPart(plan.digest, part, of) for part, of in windows.missing_parts(store, plan, manifests)]


def factor_tasks(plan: Plan, version: str) -> list[WriteFactors]:
    """Return tasks that write every factor of the plan: a large one alone, small ones together."""
    groups: list[list[str]] = []
    held = GROUP_BYTES
    for name, factor in plan.spec["factors"].items():
        size = prod(factor["shape"]) * 8
        if held + size > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return [WriteFactors(plan.digest, version, tuple(names)) for names in groups]
