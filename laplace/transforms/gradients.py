"""Gradients of a log posterior, example by example, for the empirical Fishers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from laplace.transforms.trees import flatten, identity, over_rows, per_example


def per_sample_gradients(
    log_posterior: Callable[[Any, Any], tuple[Tensor, Any]], params: Any, batch: Any, per_sample: bool
) -> tuple[Iterator[Tensor], Any]:
    """Per-example gradients at a parameter tree.

    Args:
        log_posterior: From parameters and a batch to the log posterior and auxiliary information.
        params: The tree.
        batch: One batch.
        per_sample: Whether ``log_posterior`` returns one value per example.

    Returns:
        Chunks ``(examples, entries)``, and the auxiliary information for the whole batch.

    Raises:
        ValueError: If the values are not of the shape that ``per_sample`` promises.
    """
    vector, unflatten = flatten(params)
    vector = vector.detach()
    with torch.no_grad():
        values, aux = log_posterior(params, batch)
    if per_sample and values.ndim != 1:
        raise ValueError(
            f"With per_sample=True log_posterior must return one value per example, not shape {tuple(values.shape)}."
        )
    if per_sample:
        _, vjp = torch.func.vjp(lambda theta: log_posterior(unflatten(theta), batch)[0], vector)
        return over_rows(lambda v: vjp(v)[0], identity(len(values), values), len(vector)), aux

    def gradient(example: Any) -> Tensor:
        return torch.func.grad(lambda theta: log_posterior(unflatten(theta), example)[0].sum())(vector)

    return per_example(gradient, batch, width=len(vector)), aux
