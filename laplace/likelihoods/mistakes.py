"""Everyday mistakes with outputs and targets of a classifier: what they look like, and what to give instead."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_SHAPES = frozenset(  # operations that change no value
    f"{name}Backward{number}"
    for name in (
        "View", "UnsafeView", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Clone", "Alias", "ToCopy", "Select",
        "Slice",
    )
    for number in (0, 1)
)  # fmt: skip


def check_classes(f: Tensor, y: Tensor) -> None:
    """Refuse a single logit, and targets with a value for every class where labels are due.

    Args:
        f: Outputs ``(batch, …, classes)``.
        y: Targets.

    Raises:
        ValueError: Says which of these it is.
    """
    if f.shape[1:] == (2, 1) and y.shape == f.shape[:1]:
        raise ValueError(
            f"The outputs {tuple(f.shape)} are a reward or logit in a dimension of its own for both inputs of every pair; they "
            "have to be (batch, 2): end the model's forward with .squeeze(-1)."
        )
    if y.shape != f.shape[:-1] and f.ndim > 2 and y.shape == f.shape[:1] + f.shape[2:]:
        raise ValueError(
            f"The outputs {tuple(f.shape)} have their classes in the second dimension, as labels of shape {tuple(y.shape)} "
            "tell, but they are read as (batch, …, classes): end the model's forward with .movedim(1, -1)."
        )
    if f.shape[-1] == 1:
        raise ValueError(
            f"The outputs {tuple(f.shape)} have one logit, and a softmax of one logit is 1 whatever it is. Return two: "
            "torch.cat([torch.zeros_like(z), z], -1) of a logit z has the same probabilities; or keep the one logit and give "
            "likelihood=laplace.likelihoods.Bernoulli()."
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


def warn_of_layout(f: Tensor) -> None:
    """Say so where logits may be read with the classes last, as they are here, or second, as torch's losses do."""
    if f.ndim > 2 and f.shape[1:-1] == f.shape[2:]:
        warnings.warn(
            f"Logits of shape {tuple(f.shape)} are read as (batch, …, classes), with the classes last; read as "
            "(batch, classes, …), they would fit the targets as well. If the model's classes are the second dimension, end "
            "its forward with .movedim(1, -1).",
            stacklevel=5,
        )


def warn_of_probabilities(f: Tensor) -> None:
    """Say so where outputs are probabilities of classes, of which a softmax would be taken once more."""
    f = f.detach()
    if f.shape[-1] < 2 or not bool((f >= 0).all()):
        return
    off = float((f.double().sum(-1) - 1).abs().max())
    if off <= min(max(1e-4, f.shape[-1] * torch.finfo(f.dtype).eps), 0.05):
        warnings.warn(
            f"The outputs {tuple(f.shape)} are probabilities: they sum to 1 over the classes. The likelihood takes logits, and "
            "applies the softmax itself. End the model before its softmax, or return the logarithms, as log_softmax gives.",
            stacklevel=5,
        )


def warn_of_last_operation(f: Tensor, operations: dict[str, str], takes: str) -> None:
    """Say so where a model ends in an operation that the likelihood applies itself.

    Args:
        f: Outputs with their graph.
        operations: Such operations by the names of their nodes in a graph, in words.
        takes: What the likelihood takes.
    """
    node = f.grad_fn
    while type(node).__name__ in _SHAPES:
        node = node.next_functions[0][0]
    word = operations.get(type(node).__name__)
    if word is not None:
        warnings.warn(
            f"The model ends in {word}, but the likelihood takes {takes}, and applies that itself. End the model before it.",
            stacklevel=5,
        )
