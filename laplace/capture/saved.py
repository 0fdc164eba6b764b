"""How much a forward pass leaves in memory for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.evaluation import eval_mode


def saved_bytes(model: nn.Module, x: Any) -> int:
    """Return the bytes that autograd keeps of a forward pass beside parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # not what holds the graph
        kept.setdefault(alone.untyped_storage().data_ptr(), alone)
        return alone

    with eval_mode(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    del output  # until here, so that no place is another's
    return found
