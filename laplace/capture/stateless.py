"""A forward pass with other tensors in place of a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> Any:
    """What the model answers where parameters and buffers of these names are other tensors.

    torch refuses to do so with ``nn.DataParallel``, whose copies on other devices would not know: there its module is called.
    """
    if isinstance(model, nn.DataParallel):
        tensors, model = {name.removeprefix("module."): t for name, t in tensors.items()}, model.module
    return torch.func.functional_call(model, tensors, (x,))
