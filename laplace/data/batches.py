"""Batches of a data loader as inputs and targets, wherever they come from, and what is gathered over them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.data import mistakes
from laplace.data.mistakes import check_loader
from laplace.data.nested import parts

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
    """Number of examples of a batch of inputs: of a tensor, or as most of the tensors of a dict-like batch have it.

    Raises:
        ValueError: If a dict-like batch holds neither a tensor nor a list.
    """
    if not isinstance(x, MutableMapping):
        return len(x)
    sizes = [len(value) for value in tensors_of(x)] or [len(value) for value in x.values() if isinstance(value, list)]
    if not sizes:
        raise ValueError(f"A batch with the keys {list(x)} holds no tensor, so that it has no number of examples.")
    return Counter(sizes).most_common(1)[0][0]


def is_divisible(x: Any) -> bool:
    """Whether a batch of inputs can be cut into examples; graphs and other objects go to the model as they are."""
    return isinstance(x, (Tensor, MutableMapping, Sequence))


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors of a batch of inputs that have a batch dimension, or another one in its place."""
    if isinstance(x, Mapping):
        return [tensor for value in x.values() for tensor in tensors_of(value)]
    if isinstance(x, list | tuple):
        return [tensor for value in x for tensor in tensors_of(value)]
    return [x] if isinstance(x, Tensor) and x.ndim else []


def few(x: Any) -> Any:
    """A few examples of a batch, but at least two, so that the batch can be told from other dimensions."""
    if isinstance(x, MutableMapping):
        return repeated(x, 2) if length_of(x) == 1 else x
    if not isinstance(x, Tensor):
        return x
    return torch.cat([x, x]) if len(x) == 1 else x[:_FEW]


def part_of(x: Any, part: slice | Tensor) -> Any:
    """Some examples of a batch of inputs, by a range or by indices: of a tensor, or of all that has a row for each of them.

    Raises:
        ValueError: If it is of another kind.
    """
    if not is_divisible(x):
        raise ValueError(
            f"Inputs of type {type(x).__name__} cannot be cut into examples, which is needed here. Give tensors or dict-like "
            "batches, or use the native backend with layers that la.coverage gives a contraction of their own."
        )
    if isinstance(x, MutableMapping):
        rows = part if isinstance(part, slice) else part.tolist()
        return _by_example(x, length_of(x), lambda value: _some(value, part, rows))
    return x[part]


def _some(value: Any, part: slice | Tensor, rows: slice | list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[part]
    return value[rows] if isinstance(rows, slice) else [value[row] for row in rows]


def repeated(x: Any, count: int) -> Any:
    """Inputs, which can be cut into examples, in which every example stands so many times, one copy after the other."""
    if isinstance(x, MutableMapping):
        return _by_example(x, length_of(x), lambda value: _copies(value, count))
    return _copies(x, count)


def _copies(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat_interleave(count, 0)
    return [item for item in value for _ in range(count)]


def which_have_rows(x: Any) -> dict[tuple, bool]:
    """Of what a dict-like batch holds, by its path, whether it has a row for each example; nothing of a single one."""
    n = length_of(x) if isinstance(x, MutableMapping) else 1
    return {} if n == 1 else {path: len(value) == n for path, value in parts(x).items() if _has_length(value)}


def _has_length(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def _by_example(value: Any, n: int, change: Callable[[Any], Any]) -> Any:
    """Change the tensors and lists that have a row for each of ``n`` examples; others belong to all examples together."""
    if isinstance(value, Mapping):
        return {key: _by_example(inner, n, change) for key, inner in value.items()}
    if isinstance(value, list | tuple) and tensors_of(value):
        return [_by_example(inner, n, change) for inner in value]
    return change(value) if _has_length(value) and len(value) == n else value


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
