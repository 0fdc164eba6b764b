"""Batches of a data loader as inputs and targets, wherever they come from, and what is gathered over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


def batches(
    loader: Iterable, device: torch.device | str | None = None, dict_key_y: str = "labels"
) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and targets of every batch.

    Args:
        loader: Batches ``(x, y)``, or dict-like batches, which are themselves the inputs.
        device: Where to put tensors; dict-like inputs stay where they are, models move them.
        dict_key_y: Key of the targets in dict-like batches.

    Raises:
        ValueError: If a dict-like batch does not have the key.
    """
    for batch in loader:
        if isinstance(batch, MutableMapping):
            if dict_key_y not in batch:
                raise ValueError(f"Dict-like batches need the key {dict_key_y!r} (dict_key_y), got {sorted(batch)}.")
            yield batch, batch[dict_key_y].to(device)
        else:
            x, y = batch
            yield (x.to(device) if isinstance(x, Tensor) else x), y.to(device)


def joined(rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Rows of tensors, one row per batch, as one tensor per column."""
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def is_metric(loss: Any) -> bool:
    """Whether a loss is a running metric with torchmetrics' interface, rather than a function."""
    return hasattr(loss, "update") and hasattr(loss, "compute")
