"""A batch on a device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in a batch to a device, whatever mappings, lists and tuples it lies in; the rest stays.

    Copies from pinned memory do not wait: they take their turn in the stream in which the batch is then used.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        moved = {key: to_device(item, device) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return moved
        same = copy.copy(value)  # a BatchEncoding keeps what it knows beside its tensors
        same.update(moved)
        return same
    if isinstance(value, tuple | list):
        items = [to_device(item, device) for item in value]
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return items
    return value
