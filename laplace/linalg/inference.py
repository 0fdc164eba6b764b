"""Tensors that a posterior keeps are ordinary ones, also inside of ``torch.inference_mode()``, where prediction loops run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode inside the block, or the function that this decorates.

    What is made in that mode can neither be added to nor differentiated later.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False):
        yield
