"""What a worker holds at least, and what to do where its memory is too small for that: asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from laplace_dist.plan.groups import fewest, most, plan_groups

PROCESS_BYTES = 400 * 10**6  # that a process has to itself after the imports and a segment of small sums
RAY_BYTES = 60 * 10**6  # that Ray takes in a worker's process beside what the same process takes without it
SMALLER = (
    "Use --hessian-structure diag, --subset-of-weights last_layer, freeze that layer, lower --num-workers where they share a "
    "machine, or use a larger one."
)
# Times that a worker holds what has a sketch's shape: sketch and random matrix in the pass, three where the basis is found.
SKETCH, COPIES = "lowrank-sketch", 3
FEWER_COLUMNS = (
    "Lower --rank or --oversampling{room}, use --hessian-structure kron or diag, freeze layers, lower --num-workers where they "
    "share a machine, or use a larger one."
)
# Bytes of sums up to which a segment is committed while the next one is computed: a commit takes about one hundredth of a
# segment's time, which is not worth a second copy of sums that fill a worker's memory.
BESIDE = 128 * 2**20
FILLED = 0.8  # of a worker's memory that sums and model may take where sums are divided into groups


def expected_bytes(spec: Mapping[str, Any], groups: int, model_bytes: int) -> int:
    """Return what a worker is expected to take at least, before any is started: its libraries, the model, and its sums.

    Sums that are committed while the next ones are computed are there twice. What the data set takes is not known before a
    trial, and not counted.

    Args:
        spec: Specification of the sums, as plain values.
        groups: Number of module groups.
        model_bytes: Of the model's parameters and buffers, and what a batch keeps where that is known.
    """
    sums = max(group.nbytes for group in plan_groups(spec, groups))
    times = COPIES if spec.get("structure") == SKETCH else 2 if sums <= BESIDE else 1
    return PROCESS_BYTES + RAY_BYTES + model_bytes + sums * times


def too_large(
    spec: Mapping[str, Any], model_bytes: int, memory: int | None, groups: int = 1, instead: str = SMALLER
) -> str | None:
    """Say why a fit cannot go on in the memory that a worker has, and what to change; None where it may.

    What is counted is what no worker can do without: the running sums of one module group, in float64, and the model; of a
    sketch what has its shape too.

    Args:
        spec: Specification of the sums, as plain values.
        model_bytes: Of the model's parameters and buffers.
        memory: Bytes that a worker can have; None where that is not known.
        groups: Number of module groups.
        instead: What to change, where it is no sketch.
    """
    sketched = spec.get("structure") == SKETCH
    sums = max(group.nbytes for group in plan_groups(spec, groups)) * (COPIES if sketched else 1)
    needed = sums + model_bytes
    if memory is None or needed <= memory:
        return None
    if sketched:
        return _too_wide(spec, needed, sums, memory - model_bytes, memory)
    sizes = {name: 8 * prod(factor["shape"]) for name, factor in spec["factors"].items()}
    name = max(sizes, key=lambda name: sizes[name])
    parameters = sum(prod(block["shape"]) for block in spec["blocks"])
    share = f"the largest of {groups} module groups of " if groups > 1 else ""
    return (
        f"a worker needs at least {needed:,} bytes, {sums:,} of them for {share}the sums of a {spec['structure']} "
        f"posterior over {parameters:,} weights, but can have {memory:,} at most. The largest sum is {name}, "
        f"{shape_of(spec, name)}. {instead}"
    )


def _too_wide(spec: Mapping[str, Any], needed: int, sums: int, left: int, memory: int) -> str:
    """Say why a sketch has too many columns, and how many there is room for."""
    (weights, columns), width = spec["factors"]["sketch"]["shape"], COPIES * 8
    room = max(0, left) // (width * weights)
    return (
        f"a worker needs at least {needed:,} bytes, {sums:,} of them for a sketch of {weights:,} weights × {columns} columns "
        f"(rank and oversampling), the random matrix and the basis of the same shape, but can have {memory:,} at most. "
        + FEWER_COLUMNS.format(room=f" to {room} columns together" if room else "")
    )


def groups_for(spec: Mapping[str, Any], model_bytes: int, memory: int | None) -> int:
    """Return into how many module groups sums have to be divided for the memory that a worker has.

    It is one where the sums and the model fit at all. Else it is the least number with which they leave a fifth of the memory
    to a batch and all else; where none does, the least with which they fit, and the most there can be where nothing does.

    Args:
        spec: Specification of the sums, as plain values.
        model_bytes: Of the model's parameters and buffers.
        memory: Bytes that a worker can have; None where that is not known.
    """
    if memory is None or too_large(spec, model_bytes, memory) is None:
        return 1
    return fewest(spec, int(memory * FILLED) - model_bytes) or fewest(spec, memory - model_bytes) or most(spec)


def shape_of(spec: Mapping[str, Any], name: str) -> str:
    """Write the shape of a factor."""
    return " × ".join(f"{length:,}" for length in spec["factors"][name]["shape"])
