"""Which rows of a layer's input belong to which example.

The first dimension of what a layer is given is the batch, or the batch with positions folded into it. Models that pick rows
by their values, as those that leave padding out do, keep to that on some batches and not on others. Where a graph does not
exclude it, every batch is asked: weights of the examples have to come back, each from the rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from laplace.capture.calls import nodes
from laplace.noise import fixed_directions

ORDERING = (  # kinds of operations that can put any row anywhere
    "Index", "Gather", "Scatter", "MaskedSelect", "MaskedScatter", "Take", "Nonzero", "Segment", "Sort", "Topk", "Kthvalue",
    "Median", "Mode", "Unique", "Roll", "Flip",
)  # fmt: skip


def picks_rows(output: Tensor) -> bool:
    """Whether a graph has operations that can put any row anywhere."""
    return any(name in type(node).__name__ for node in nodes(output) for name in ORDERING)


def picks_by_mask(output: Tensor) -> bool:
    """Whether a graph has operations whose number of rows depends on values: indices by a mask."""
    for node in nodes(output):
        if type(node).__name__ == "MaskedSelectBackward0":
            return True
        indices = getattr(node, "_saved_indices", None) if "Index" in type(node).__name__ else None
        if any(index is not None and index.dtype == torch.bool for index in _tensors(indices)):
            return True
    return False


def _tensors(indices: object) -> Iterable[Tensor | None]:
    return indices if isinstance(indices, (tuple, list)) else ()


def example_weights(f: Tensor) -> Tensor:
    """A power of two and a sign for every example of a batch of outputs, which differ between neighbours."""
    order = torch.arange(len(f), device=f.device)
    return (1 - 2 * (order % 2)) * 2.0 ** (order // 2 % 4)


def check_attribution(capture) -> None:
    """Refuse a batch in which a layer's rows are not those of the examples that they are taken for.

    Directions are multiplied by a power of two and a sign that differ between neighbouring examples, so that the output
    gradients of every example have to be multiplied by exactly that.

    Raises:
        ValueError: If they are not; names the layer.
    """
    n = len(capture.f)
    weights = example_weights(capture.f)
    v = fixed_directions(capture.f)
    tolerance = min(1e3 * capture.coarsest, 0.01)
    plain = capture.layer_gradients(v)
    weighted = capture.layer_gradients(v * weights.to(v.dtype).view(-1, *[1] * (v.ndim - 1)))
    for layer, g in plain.items():
        same = len(g) == n
        if same:
            expected = g * weights.to(g.dtype)[:, None, None]
            same = bool((weighted[layer] - expected).norm() <= tolerance * expected.norm())
        if not same:
            raise ValueError(
                f"The rows that layer {layer!r} is given in this batch of {n} examples do not belong to them in order, the "
                "same number for each: the model picks or reorders rows by their values. Use batches of one example "
                "(batch_size=1) for the fit and for predictions, or set requires_grad=False on the layer's parameters."
            )
