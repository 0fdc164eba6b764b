"""Reduce: factors summed over the partials in plan order, for a posterior version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from laplace.curvature.sums import sum_in_order
from laplace_dist.plan.plan import Plan
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.layout import LOSS
from laplace_dist.run.partials import place_of
from laplace_dist.run.versions import manifests
from laplace_dist.stages.context import Context

GROUP_BYTES = 32 * 2**20


def groups(spec: Mapping[str, Any]) -> list[list[str]]:
    """Return the names of the factors, in lists that one task each sums.

    A large factor is alone, so that a task's memory is two copies of it; small ones share a task, since each task
    reads every manifest.

    Args:
        spec: The plan's specification of the sums.
    """
    size = torch.finfo(getattr(torch, spec["dtype"])).bits // 8
    result, held = [[LOSS]], 0
    for name, factor in spec["factors"].items():
        bytes_ = prod(factor["shape"]) * size
        if held + bytes_ > GROUP_BYTES:
            result.append([])
            held = 0
        result[-1].append(name)
        held += bytes_
    return result


@dataclass(frozen=True)
class SumFactors:
    """Sum some factors over the partials in plan order and write them for a posterior version.

    The sum is in float64 and rounded once. Nothing refers to what was written before `versions.commit_version` does.

    Attributes:
        plan: Digest of the plan.
        version: Name of the posterior version.
        names: Factors to sum.
    """

    plan: str
    version: str
    names: tuple[str, ...]

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"sum of {self.names[0]}, …"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt has `prefix` and `entry` of each array by name, under `factors`."""
        store, plan = context.store, context.plan
        slim = [{**m, "arrays": {name: m["arrays"][name] for name in self.names}} for m in manifests(store, plan)]
        found = {}
        for name in self.names:
            prefix = f"posteriors/{self.version}/{new_attempt()}"
            reads = store.read_arrays(place_of(manifest, name) for manifest in slim)
            total = sum_in_order(torch.from_numpy(read()) for read in reads)
            symmetric = {name} if name != LOSS and plan.spec["factors"][name]["symmetric"] else set()
            entry = store.write_arrays(prefix, {name: total.numpy()}, symmetric)[name]
            found[name] = {"prefix": prefix, "entry": entry}
        return {"factors": found}


def tasks(plan: Plan, version: str) -> list[SumFactors]:
    """Return the tasks that sum every factor of the plan."""
    return [SumFactors(plan.digest, version, tuple(names)) for names in groups(plan.spec)]
