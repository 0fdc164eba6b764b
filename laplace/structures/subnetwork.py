"""Subnetworks: indices of the parameter vector, checked once and split over the parameter tensors that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace.capture.blocks import Block
from laplace.structures.specification import Factor


def check_subnetwork_indices(indices: Any, n_params: int) -> Tensor:
    """Refuse what does not choose a subnetwork.

    Args:
        indices: Indices of the vector of all parameters with ``requires_grad``, in any order, without repeats.
        n_params: Length of that vector.

    Returns:
        The indices.

    Raises:
        ValueError: Says what is wrong and what is valid.
    """
    valid = f"a non-empty 1-D LongTensor without repeats, of indices in 0…{n_params - 1}"
    if indices is None:
        raise ValueError(f"subnetwork_indices is None; it has to be {valid}. See laplace.utils.subnetmask.")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        kind = f"a tensor of {indices.dtype}" if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"subnetwork_indices is {kind}; it has to be {valid}.")
    if indices.ndim != 1 or len(indices) == 0:
        raise ValueError(f"subnetwork_indices has shape {tuple(indices.shape)}; it has to be {valid}.")
    outside = indices[(indices < 0) | (indices >= n_params)]
    if len(outside):
        raise ValueError(f"subnetwork_indices holds {int(outside[0])}, which is out of range; it has to be {valid}.")
    values, counts = indices.unique(return_counts=True)
    if len(values) < len(indices):
        raise ValueError(f"subnetwork_indices repeats {int(values[counts > 1][0])}; it has to be {valid}.")
    return indices


def given_order(indices: Tensor | None) -> Tensor | None:
    """Places of the given indices among the sorted ones, in which curvature is summed; None where they are sorted already.

    Sums have the entries of every tensor in order. ``value[order]`` brings what was summed to the order of the user's indices,
    ``value[order.argsort()]`` brings it back.
    """
    if indices is None or bool((indices.diff() > 0).all()):
        return None
    return indices.argsort().argsort()


def split_indices(indices: Tensor, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...] | None]:
    """Distribute indices of the parameter vector over the tensors that it consists of.

    Args:
        indices: From :func:`check_subnetwork_indices`.
        sizes: Number of entries of every tensor by name, in order.

    Returns:
        For each tensor that holds any of them, its own flat indices in order, or None where that is all of its entries.
    """
    indices = indices.cpu().sort().values
    edges = torch.tensor([0, *sizes.values()], device="cpu").cumsum(0)
    cuts = torch.searchsorted(indices, edges).tolist()
    found: dict[str, tuple[int, ...] | None] = {}
    for number, (name, size) in enumerate(sizes.items()):
        local = indices[cuts[number] : cuts[number + 1]] - edges[number]
        if len(local):
            found[name] = None if len(local) == size else tuple(local.tolist())
    return found


def blocks_of(structure, shapes, found, kept):
    """Sums over the chosen entries alone."""
    blocks = []
    for name, shape in shapes.items():
        layer, reason, *_ = found[name]
        if kept[name] is not None:
            reason += f"; {len(kept[name])} of {torch.Size(shape).numel()} entries"
        factor = "full" if structure == "full" else f"{name}/diag"
        blocks.append(Block(name, shape, layer, (factor,), reason, kept[name]))
    if structure == "full":
        size = sum(block.size for block in blocks)
        return blocks, {"full": Factor((size, size), symmetric=True)}
    return blocks, {b.factors[0]: Factor(b.shape if b.chosen is None else (b.size,)) for b in blocks}
