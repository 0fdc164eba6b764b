"""Inputs of another floating-point type than the model's, which a prediction refuses in the words of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.evaluation import eval_mode
from laplace.capture.forward import run


@torch.no_grad()
def check_type(model: nn.Module, x: Any, of: str) -> None:
    """Try inputs whose floating-point type is none of the parameters': only a model that converts them can take them.

    Raises:
        ValueError: If it cannot; names the module.
    """
    known = {p.dtype for p in model.parameters()}
    tensors = [t for t in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(t, Tensor)]
    if any(t.is_floating_point() and t.dtype not in known for t in tensors):
        with eval_mode(model):
            run(model, x, of)
