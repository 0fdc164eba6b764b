"""Inputs of several parts as one flat mapping, which the core library can cut into examples, and back.

The core library takes a tensor, or a mapping whose values are tensors. A batch may be nested deeper, or be a list. It then
travels as a mapping from paths to tensors, such as ``{("image",): …, ("size", 0): …}``, and is put together again where the
model is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor


def flat(x: Any) -> Any:
    """Return a batch of inputs in the form that the core library takes.

    Args:
        x: A tensor, or mappings, lists and tuples of tensors, nested in any way. Lists of strings or numbers are leaves.

    Returns:
        ``x`` itself where it is a tensor, a mapping of leaves, or a leaf of another kind; else a mapping from paths, which are
        tuples of keys and places in lists.
    """
    if not _is_container(x):
        return x
    if isinstance(x, Mapping) and not any(_is_container(value) for value in x.values()):
        return x if isinstance(x, MutableMapping) else dict(x)
    return parts(x)


def parts(x: Any) -> dict[tuple, Any]:
    """Return the mapping from paths to the leaves of mappings, lists and tuples."""
    items = x.items() if isinstance(x, Mapping) else enumerate(x)
    return {path: leaf for key, value in items for path, leaf in _leaves((key,), value)}


def _leaves(path: tuple, value: Any) -> Iterator[tuple[tuple, Any]]:
    if not _is_container(value):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves((*path, key), inner)


def _is_container(value: Any) -> bool:
    """Say whether this is a mapping, or a list or tuple that holds a tensor somewhere."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and any(isinstance(v, Tensor) or _is_container(v) for v in value)


def is_flat(x: Any) -> bool:
    """Say whether this is what ``parts`` returned."""
    return isinstance(x, Mapping) and bool(x) and all(isinstance(key, tuple) for key in x)


def nested(leaves: Mapping[tuple, Any]) -> Any:
    """Return what ``parts`` was given; tuples come back as lists, as they do from a ``DataLoader``."""
    groups: dict[Any, dict[tuple, Any]] = {}
    for path, leaf in leaves.items():
        groups.setdefault(path[0], {})[path[1:]] = leaf
    values = {key: group[()] if () in group else nested(group) for key, group in groups.items()}
    return _as_list(values) if all(isinstance(key, int) for key in values) else values


def _as_list(values: Mapping[int, Any]) -> Sequence[Any]:
    return [values[place] for place in sorted(values)]
