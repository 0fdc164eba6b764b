"""Trees of tensors as one vector, batches as examples, and products in chunks.

Trees are those of optree: dictionaries go by their sorted keys, whatever the order in which they were filled, so that a
precision belongs to the same entries everywhere; ``None`` holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements of the vectors that are pushed through the model at once

tree_map = optree.tree_map


def flatten(tree: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A tree of tensors as one vector, and the way back.

    Args:
        tree: Nested dictionaries, lists, tuples and named tuples of floating-point tensors, or one tensor.

    Returns:
        The vector ``(entries,)``; and a function from ``(…, entries)`` to a tree whose leaves have the same leading
        dimensions.

    Raises:
        ValueError: If there is no tensor in the tree, or something else.
    """
    leaves, structure = optree.tree_flatten(tree)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves})
        raise ValueError(f"Expected a tree of tensors, got leaves of type {kinds}.")
    shapes, sizes = [leaf.shape for leaf in leaves], [leaf.numel() for leaf in leaves]

    def unflatten(vector: Tensor) -> Any:
        parts = vector.split(sizes, -1)
        values = [part.reshape((*vector.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)]
        return optree.tree_unflatten(structure, values)

    return torch.cat([leaf.reshape(-1) for leaf in leaves]), unflatten


def examples(batch: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any], int]:
    """Tensors of a batch that have a row for every example, a way to put others in their place, and their number.

    Raises:
        ValueError: If the tensors of the batch do not agree on their first dimension.
    """
    leaves, structure = optree.tree_flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim]
    sizes = {len(leaves[i]) for i in places}
    if len(sizes) != 1:
        raise ValueError(
            f"The tensors of a batch need one common first dimension, the examples; they have {sorted(sizes)}."
        )

    def rebuild(tensors: list[Tensor]) -> Any:
        values = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return optree.tree_unflatten(structure, values)

    return [leaves[i] for i in places], rebuild, sizes.pop()


def per_example(function: Callable[..., Tensor], batch: Any, *rows: Tensor, width: int) -> Iterator[Tensor]:
    """``function(batch of one example, *its rows)`` for all examples, stacked in chunks of about ``_CHUNK / width``."""
    tensors, rebuild, n = examples(batch)

    def one(own: list[Tensor], *others: Tensor) -> Tensor:
        return function(rebuild([t.unsqueeze(0) for t in own]), *others)

    for part in _parts(n, width):
        yield torch.func.vmap(one)([t[part] for t in tensors], *[r[part] for r in rows])


def over_rows(function: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Iterator[Tensor]:
    """``function(row)`` for every row of a matrix, stacked in chunks of about ``_CHUNK / width``."""
    for part in _parts(len(rows), width):
        yield torch.func.vmap(function)(rows[part])


def _parts(n: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, width))
    return (slice(start, start + step) for start in range(0, n, step))


def identity(size: int, like: Tensor) -> Tensor:
    """Identity matrix of the given size with the type and device of another tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)
