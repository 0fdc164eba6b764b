"""Reduce: factors summed over the partials in plan order, for a posterior version."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from laplace.curvature.sums import sum_in_order
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.layout import LOSS
from laplace_dist.run.partials import place_of
from laplace_dist.run.versions import manifests

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


def reduce_group(context: Any, version: str, names: list[str]) -> dict[str, Any]:
    """Sum some factors over the partials in plan order and write them for a posterior version.

    The sum is in float64 and rounded once. Nothing refers to what was written before `commit_version` does.

    Args:
        context: The worker's store and plan.
        version: Name of the posterior version.
        names: Factors to sum.

    Returns:
        For each name, `prefix` and `entry` of the array.
    """
    store, plan = context.store, context.plan
    slim = [{**m, "arrays": {name: m["arrays"][name] for name in names}} for m in manifests(store, plan)]
    found = {}
    for name in names:
        prefix = f"posteriors/{version}/{new_attempt()}"
        reads = store.read_arrays(place_of(manifest, name) for manifest in slim)
        total = sum_in_order(torch.from_numpy(read()) for read in reads)
        symmetric = {name} if name != LOSS and plan.spec["factors"][name]["symmetric"] else set()
        entry = store.write_arrays(prefix, {name: total.numpy()}, symmetric)[name]
        found[name] = {"prefix": prefix, "entry": entry}
    return found
