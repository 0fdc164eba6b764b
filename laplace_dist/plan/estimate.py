"""What a fit will take, worked out from its plan and from what a trial of it took: bytes, requests, memory, time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from laplace_dist.plan.plan import Plan
from laplace_dist.plan.worker_memory import FEWER_COLUMNS, PROCESS_BYTES, RAY_BYTES, SKETCH, SMALLER

# List prices of S3 Standard in US East (N. Virginia), dollars for a thousand requests.
PUT_PRICE, GET_PRICE = 0.005, 0.0004
# What a loaded posterior holds of each entry of the first pass's sums, by structure: bytes of float64 numbers (the sum, a dense
# matrix's eigenvectors or root), and numbers of its own type (the rounded factor, and its eigenvectors).
_LOADED = {"kron": (8, 2), "ekfac": (0, 1), "diag": (8, 1), "full": (16, 0), "blockdiag": (16, 0), "lowrank": (8, 0)}
COMMIT_SHARE = 0.02  # of a segment's time, above which larger segments are worth it


@dataclass(frozen=True)
class Trial:
    """What a few batches, one commit and one part's sum took.

    Attributes:
        batch_seconds: Of a batch, without the first one.
        commit_seconds: Of a partial's commit; CPU seconds, where it goes on beside the next segment.
        sum_seconds: Of adding one partial's part to a sum.
        partial_bytes: Of a partial as stored, of the largest group.
        writes: Objects that a commit creates.
        reads: Objects that it reads back, and asks for.
        peak_bytes: Of the process, at its largest.
        node_bytes: Memory of the machine; None where it is not known.
        kept_bytes: That a worker's allocator keeps, from one segment to the next, of sums that were committed beside one: as
            much as one segment's, from what workers were measured to take (see `benchmarks/planning.py`).
    """

    batch_seconds: float
    commit_seconds: float
    sum_seconds: float
    partial_bytes: int
    writes: int
    reads: int
    peak_bytes: int
    node_bytes: int | None
    kept_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a fit will take.

    Attributes:
        parameters: Weights that the posterior is over.
        module_groups: Passes over the data, each of which adds up a group of the factors.
        estimator: Which one it is, and what it costs, for people.
        coverage: Of each kind of treatment, its tensors and its share of the weights.
        factors: Number of factors.
        largest: Name and width of the factor with most entries.
        sums_bytes: Of the running sums of a worker, float64: of the largest group.
        partial_bytes: Of a segment's partials as stored.
        segments: Their number.
        batches: Batches in all, of all passes.
        stored_bytes: Of all partials, the window's sum and the posterior version, while the partials are kept.
        writes: Requests that write, of the map phase.
        reads: Requests that read, of the map phase.
        dollars: What these cost on S3.
        peak_bytes: Of a worker of the map phase.
        posterior_bytes: That a loaded posterior holds, in whatever tunes, evaluates or predicts with it.
        workers: That the times are for.
        map_seconds: Of the map phase.
        commit_share: Of its time that goes into commits, if they do not overlap with it.
        reduce_seconds: Of the reduction.
        advice: What limits, and what to change, a sentence each.
        weights: Number of examples, and what their weights are told by; None where they have none.
    """

    parameters: int
    module_groups: int
    estimator: str
    coverage: dict[str, tuple[int, float]]
    factors: int
    largest: tuple[str, int]
    sums_bytes: int
    partial_bytes: int
    segments: int
    batches: int
    stored_bytes: int
    writes: int
    reads: int
    dollars: float
    peak_bytes: int
    posterior_bytes: int
    workers: int
    map_seconds: float
    commit_share: float
    reduce_seconds: float
    advice: tuple[str, ...]
    weights: tuple[int, Mapping[str, Any]] | None = None


def estimate(
    plan: Plan, trial: Trial, coverage: Sequence[tuple[str, str, str]], workers: int, estimator: str = ""
) -> Estimate:
    """Work out what a fit takes.

    Args:
        plan: Of the fit.
        trial: What a few of its batches took.
        coverage: `(parameter, kind, reason)` of every tensor.
        workers: How many there will be.
        estimator: Which one, and what it costs, for people.
    """
    size = plan.settings["batch_size"]
    batches = sum(math.ceil((unit.stop - unit.start) / size) for unit in plan.units)
    segments, units = len(plan.segments), len(plan.units)
    per_segment = batches / units * trial.batch_seconds
    rounds = math.ceil(units / workers)
    entries = plan.places[-1].stop
    largest_group = max(plan.groups, key=lambda group: group.nbytes)
    partial_bytes = trial.partial_bytes * entries // max(1, largest_group.stop - largest_group.start)
    sizes = {name: prod(factor["shape"]) for name, factor in plan.spec["factors"].items()}
    largest = max(sizes, key=lambda name: sizes[name])
    writes, reads = units * trial.writes, units * trial.reads
    found = {
        "estimator": estimator,
        "parameters": sum(prod(block["shape"]) for block in plan.spec["blocks"]),
        "module_groups": len(plan.groups),
        "coverage": _summary(plan, coverage),
        "factors": len(sizes),
        "largest": (largest, plan.spec["factors"][largest]["shape"][0]),
        "sums_bytes": largest_group.nbytes,
        "partial_bytes": partial_bytes,
        "segments": segments,
        "batches": batches,
        "stored_bytes": segments * partial_bytes + 2 * 8 * entries,
        "writes": writes,
        "reads": reads,
        "dollars": (writes * PUT_PRICE + reads * GET_PRICE) / 1000,
        "peak_bytes": trial.peak_bytes + trial.kept_bytes + RAY_BYTES,
        "posterior_bytes": loaded_bytes(plan),
        "workers": workers,
        "map_seconds": rounds * (per_segment + trial.commit_seconds),
        "commit_share": trial.commit_seconds / (per_segment + trial.commit_seconds),
        "reduce_seconds": math.ceil(len(plan.parts) / workers) * segments * trial.sum_seconds,
    }
    weights = (plan.n_examples, plan.data["weights"]) if "weights" in plan.data else None
    return Estimate(**found, advice=tuple(_advice(plan, trial, found)), weights=weights)


def loaded_bytes(plan: Plan) -> int:
    """Return what a posterior holds once it was loaded and has predicted; module groups make it no smaller."""
    structure = plan.settings["hessian_structure"]
    weights = sum(prod(block["shape"]) for block in plan.spec["blocks"])
    wide, own = _LOADED[structure]
    size = getattr(torch, plan.spec["dtype"]).itemsize
    entries = sum(prod(factor["shape"]) for factor in plan.spec["factors"].values())
    second = (8 + size) * weights if structure == "ekfac" else 0  # the diagonal in the basis, summed and rounded
    return (
        entries * (wide + own * size) + second + 2 * size * weights
    )  # the mean, and what tells that weights have changed


def _summary(plan: Plan, coverage: Sequence[tuple[str, str, str]]) -> dict[str, tuple[int, float]]:
    sizes = {block["parameter"]: prod(block["shape"]) for block in plan.spec["blocks"]}
    tensors, weights = Counter(kind for _, kind, _ in coverage), Counter()
    for parameter, kind, _ in coverage:
        weights[kind] += sizes[parameter]
    total = max(1, sum(sizes.values()))
    return {kind: (tensors[kind], weights[kind] / total) for kind in tensors}


def _advice(plan: Plan, trial: Trial, found: dict) -> list[str]:
    said = []
    if trial.node_bytes is not None and found["peak_bytes"] > trial.node_bytes:
        name, width = found["largest"]
        remedy = FEWER_COLUMNS.format(room="") if plan.spec.get("structure") == SKETCH else SMALLER
        said.append(
            f"A worker needs more memory than this machine has; the largest of its sums is {name} of width {width:,}. {remedy}"
        )
    loaded = PROCESS_BYTES + RAY_BYTES + found["posterior_bytes"]
    if trial.node_bytes is not None and loaded > trial.node_bytes:
        said.append(
            "A worker that tunes or evaluates needs more memory than this machine has, "
            f"{found['posterior_bytes']:,} bytes of it for the posterior, and module groups make that no less. Give "
            "--skip-tune and --skip-evaluate and do both on a larger machine, or use --hessian-structure diag or "
            "--subset-of-weights last_layer."
        )
    if found["commit_share"] > COMMIT_SHARE and found["segments"] > 4 * found["workers"]:
        said.append(
            f"Commits take {found['commit_share']:.0%} of a segment's time: a larger --segment-size than "
            f"{plan.segments[0].stop - plan.segments[0].start} makes that less."
        )
    if plan.further is not None:
        said.append(
            "These figures are of the first of two passes over the data. The second one takes about as long again."
        )
    if found["segments"] < found["workers"]:
        said.append(f"{found['workers']} workers share {found['segments']} segments: give a smaller --segment-size.")
    return said
