"""Reduce: the partials summed part by part, then the factors of the posterior version taken from the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from laplace_dist.errors import CheckpointError, listed
from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import Plan
from laplace_dist.run import partial_manifests, versions, windows
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.combination import Term, terms_of, windows_of
from laplace_dist.run.layout import attempt_prefix, version_key
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
        window = context.window_of(self.plan)
        store, plan = window.store, window.plan
        manifests = list(partial_manifests.manifests(store, plan, self.part))
        total = windows.sum_part(store, plan, manifests, self.part)
        windows.commit_part(store, plan, self.part, total, self.of, environment(context.device))
        return {}


@dataclass(frozen=True)
class WriteFactors:
    """Write some factors of a weighted sum of windows by name; `versions.commit_version` refers to them.

    Attributes:
        plan: Digest of the plan.
        version: Name of the posterior version.
        weights: The windows' weights by their names, in order.
        names: Of the factors.
    """

    plan: str
    version: str
    weights: dict[str, float]
    names: tuple[str, ...]

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"factors {self.names[0]}, …"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has `prefix` and `entry` of each array by name, under `factors`."""
        store, plan = context.store, context.plan
        there = {window.name: window for window in windows_of(store, plan)}
        if gone := self.weights.keys() - there.keys():
            raise CheckpointError(
                f"the windows {listed(sorted(gone))} are not there any more: another job has taken over and deleted them."
            )
        terms = terms_of([(there[name], weight) for name, weight in self.weights.items()])
        if versions.version_of(terms) != self.version:
            raise CheckpointError(
                f"the sums of the windows {', '.join(self.weights)} are not those that the driver has read."
            )
        arrays = versions.factors_of(terms, self.names)
        symmetric = {name for name in self.names if plan.posterior_spec["factors"][name]["symmetric"]}
        prefix = attempt_prefix(version_key(self.version), new_attempt())
        entries = store.write_arrays(prefix, arrays, symmetric)
        return {"factors": {name: {"prefix": prefix, "entry": entry} for name, entry in entries.items()}}


def part_tasks(store: Store, plan: Plan, manifests: Sequence[Mapping[str, Any]]) -> list[SumPart]:
    """Return a task for every part that has no sum of these partials."""
    return [SumPart(plan.digest, part, of) for part, of in windows.missing_parts(store, plan, manifests)]


def factor_tasks(plan: Plan, terms: Sequence[Term]) -> list[WriteFactors]:
    """Return tasks that write every factor of a posterior version: a large one alone, small ones together."""
    version, weights = versions.version_of(terms), {term.window.name: term.weight for term in terms}
    groups: list[list[str]] = []
    held = GROUP_BYTES
    for name, factor in plan.posterior_spec["factors"].items():
        size = prod(factor["shape"]) * 8
        if held + size > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return [WriteFactors(plan.digest, version, weights, tuple(names)) for names in groups]
