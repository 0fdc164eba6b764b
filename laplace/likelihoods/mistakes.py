"""Everyday mistakes with the targets of a classifier: one sentence that says what they look like and what to give instead."""

from __future__ import annotations

import torch
from torch import Tensor


def check_classes(f: Tensor, y: Tensor) -> None:
    """Refuse a single logit, and targets with a value for every class where labels are due.

    Args:
        f: Outputs ``(batch, …, classes)``.
        y: Targets.

    Raises:
        ValueError: Says which of these it is.
    """
    if f.shape[-1] == 1:
        raise ValueError(
            f"The outputs {tuple(f.shape)} have one logit, and a softmax of one logit is 1 whatever it is. Return two: "
            "torch.cat([torch.zeros_like(z), z], -1) of a logit z has the same probabilities."
        )
    if y.shape != f.shape or y.ndim < 2:
        return
    ones = (y == 1).sum(-1)
    binary = bool(((y == 0) | (y == 1)).all())
    if binary and bool((ones == 1).all()):
        raise ValueError(f"Targets of shape {tuple(y.shape)} are one-hot; give the labels, y.argmax(-1).")
    if binary:
        raise ValueError(
            f"Targets of shape {tuple(y.shape)} hold several labels or none per example; likelihood='classification' has one "
            "class per example. Independent labels need a Bernoulli likelihood."
        )
    if y.is_floating_point() and bool(torch.isclose(y.sum(-1), torch.ones_like(y[..., 0]), atol=1e-4).all()):
        raise ValueError(
            f"Targets of shape {tuple(y.shape)} are probabilities of classes; likelihood='classification' takes labels, such "
            "as y.argmax(-1)."
        )
