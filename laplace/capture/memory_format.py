"""The memory format of images: convolutions on CPUs, and above all their backward passes, run fastest with channels last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

Run = TypeVar("Run")
_PLAIN: WeakSet[nn.Module] = WeakSet()  # models that were seen to need channels first, as those that call `view` do
_OF_VIEWS = "view size is not compatible"  # torch's own words, for want of a class of error


def run(once: Callable[[Any], Run], model: nn.Module, x: Any, layers: Iterable[Any]) -> Run:
    """Run a model, with the channels of images last in memory where that is faster.

    Values do not depend on it but for rounding. A model that cannot do with it, since it takes views that the other order of
    memory does not have, is run as it is, now and from then on.

    Args:
        once: Runs the model on given inputs.
        model: The model.
        x: Its inputs.
        layers: The layers whose curvature is wanted.
    """
    if model not in _PLAIN and _is_faster(x, layers):
        try:
            return once(_channels_last(x))
        except RuntimeError as error:
            if _OF_VIEWS not in str(error):
                raise
            _PLAIN.add(model)
    return once(x)


def _is_faster(x: Any, layers: Iterable[Any]) -> bool:
    images = isinstance(x, Tensor) and x.ndim == 4 and x.device.type == "cpu" and x.dtype == torch.float32
    return images and torch.backends.mkldnn.is_available() and any(isinstance(m, nn.Conv2d) for m in layers)


def _channels_last(x: Tensor) -> Tensor:
    """Return a copy, so that a model which changes its input does not change it twice if it has to run again."""
    return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last).copy_(x)
