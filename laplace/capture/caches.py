"""Tensors that modules keep between forward passes, computed from their parameters.

Some attention layers keep their position biases indexed while they are in evaluation mode (LeViT and its family): as plain
attributes or in a dictionary, dropped by their own ``train``. Made without a graph, or inside of a transform, these are of
no use to any other pass. So are the weights that torch keeps inside of ``torch.nn.utils.parametrize.cached()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def keeps(module: nn.Module) -> bool:
    """Whether a module may keep tensors: it has a ``train`` of its own, to drop or renew them."""
    return type(module).train is not nn.Module.train


def renew(keepers: Iterable[nn.Module]) -> None:
    """Have those of some modules that are in evaluation mode drop or renew what they have kept."""
    for module in keepers:
        if not module.training and _kept(module):
            with torch.inference_mode(False), torch.enable_grad():
                module.train(True)
                module.train(False)


@contextmanager
def without_kept_weights() -> Iterator[None]:
    """Have re-parametrised weights computed anew in every pass inside the block, in which others may stand for them."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Leave tensors that modules keep, or that hooks compute before a pass as those of ``weight_norm``, as they were."""
    keepers = [m for m in model.modules() if m._forward_pre_hooks or keeps(m)]
    before = [(module, _kept(module)) for module in keepers]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in _kept(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)


def _kept(module: nn.Module) -> dict[str, Any]:
    """Attributes that are tensors, or copies of dictionaries of tensors, and no parameters or buffers."""
    found: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif (
            isinstance(value, dict) and not name.startswith("_") and any(isinstance(v, Tensor) for v in value.values())
        ):
            found[name] = dict(value)
    return found
