"""Batches of a data loader as inputs and targets, wherever they come from, and what is gathered over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.data import mistakes
from laplace.data.mistakes import check_loader

_FEW = 8  # examples that are enough to check what a model does with each


def batches(
    loader: Iterable, device: torch.device | str | None = None, dict_key_y: str = "labels"
) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and targets of every batch.

    Args:
        loader: Batches ``(x, y)``, or dict-like batches, which are themselves the inputs.
        device: Where to put tensors and whatever else has ``.to``; dict-like inputs stay where they are, models move them.
        dict_key_y: Key of the targets in dict-like batches.

    Raises:
        MissingKeyError: If a dict-like batch does not have the key.
        ValueError: If the loader gives no batches of tensors; says what it gives instead.
    """
    check_loader(loader)
    for number, batch in enumerate(loader):
        x, y = mistakes.inputs_and_targets(batch, dict_key_y, number)
        if number == 0:
            mistakes.warn_of_unshifted(x, y)
        moves = hasattr(x, "to") and not isinstance(x, MutableMapping)
        yield (x.to(device) if moves else x), y.to(device)


def length_of(x: Any) -> int:
    """Number of examples of a batch of inputs: of a tensor, or of the first tensor of a dict-like batch."""
    return len(next(v for v in x.values() if isinstance(v, Tensor) and v.ndim) if isinstance(x, MutableMapping) else x)


def is_divisible(x: Any) -> bool:
    """Whether a batch of inputs can be cut into examples; graphs and other objects go to the model as they are."""
    return isinstance(x, (Tensor, MutableMapping, Sequence))


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors of a batch of inputs that have a batch dimension."""
    values = x.values() if isinstance(x, MutableMapping) else [x]
    return [value for value in values if isinstance(value, Tensor) and value.ndim]


def few(x: Any) -> Any:
    """A few examples of a batch, but at least two, so that the batch can be told from other dimensions."""
    if isinstance(x, MutableMapping):
        sizes = {len(value) for value in x.values() if isinstance(value, Tensor) and value.ndim > 0}
        if sizes != {1}:
            return x
        return {key: torch.cat([value, value]) if isinstance(value, Tensor) else value for key, value in x.items()}
    if not isinstance(x, Tensor):
        return x
    return torch.cat([x, x]) if len(x) == 1 else x[:_FEW]


def part_of(x: Any, part: slice | Tensor) -> Any:
    """Some examples of a batch of inputs, by a range or by indices: of a tensor, or of every tensor of a dict-like batch.

    Raises:
        ValueError: If it is of another kind.
    """
    if not is_divisible(x):
        raise ValueError(
            f"Inputs of type {type(x).__name__} cannot be cut into examples, which is needed here. Give tensors or dict-like "
            "batches, or use the native backend with layers that la.coverage gives a contraction of their own."
        )
    if isinstance(x, MutableMapping):
        rows = {key: value[part] for key, value in x.items() if isinstance(value, Tensor) and value.ndim}
        return {**x, **rows}
    return x[part]


def repeated(x: Any, count: int) -> Any:
    """Inputs, which can be cut into examples, in which every example stands so many times, one copy after the other."""
    if isinstance(x, MutableMapping):
        rows = {key: v.repeat_interleave(count, 0) for key, v in x.items() if isinstance(v, Tensor) and v.ndim}
        return {**x, **rows}
    if isinstance(x, Tensor):
        return x.repeat_interleave(count, 0)
    return [item for item in x for _ in range(count)]


def joined(rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Rows of tensors, one row per batch, as one tensor per column."""
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def loss_of(loss: Callable[..., Any], rows: Sequence[tuple[Tensor, ...]]) -> float:
    """A user's loss of all predictions and targets.

    Args:
        loss: A function or module.
        rows: Per batch, what is predicted and the targets.

    Raises:
        ValueError: If it takes another number of arguments; says which it is given.
    """
    columns = joined(rows)
    given = "means, variances and targets" if len(columns) == 3 else "predictions and targets"
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function in C nothing is known before it is called
        return float(loss(*columns))
    try:
        signature.bind(*columns)
    except TypeError as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(
            f"loss={name} does not take the {len(columns)} arguments that it is given, {given} ({error}). Give a function of "
            "these, as lambda mean, variance, y: … of a regression, or a torchmetrics metric, which sees first and last."
        ) from error
    return float(loss(*columns))


def is_metric(loss: Any) -> bool:
    """Whether a loss is a running metric with torchmetrics' interface, rather than a function."""
    return hasattr(loss, "update") and hasattr(loss, "compute")
