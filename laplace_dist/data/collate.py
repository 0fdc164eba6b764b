"""From examples to a batch, as a `DataLoader` makes it, and from a batch to inputs and targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from laplace.data.nested import flat, parts
from laplace_dist.config.import_path import load_callable
from laplace_dist.config.settings import Config
from laplace_dist.errors import ExampleError, SettingsError, listed


@dataclass(frozen=True)
class Collate:
    """How examples become a batch, and a batch inputs and targets.

    Attributes:
        path: Import path of a function like `DataLoader`'s `collate_fn`; torch's own if None.
        key_x: Key of the inputs in dict-like batches, which go to the model whole; checked where it is not the default.
        key_y: Key of the targets in dict-like batches.
    """

    path: str | None = None
    key_x: str = "input_ids"
    key_y: str = "labels"

    @classmethod
    def of(cls, config: Config) -> Collate:
        """Return what the settings say."""
        return cls(config.collate, config.dict_key_x, config.dict_key_y)

    def batch(self, items: Sequence[Any], start: int) -> Any:
        """Join examples to a batch.

        Args:
            items: The examples.
            start: Index of the first one in the data set.

        Raises:
            ExampleError: They cannot be joined; the message names the first one that differs, and how.
            SettingsError: `--collate` names no callable.
        """
        indices = tuple(range(start, start + len(items)))
        if self.path is not None:
            function = load_callable(self.path, "--collate")
            try:
                return function(items)
            except Exception as error:  # the user's own code, as where an example is read
                raise ExampleError(
                    f"--collate: {self.path!r} fails on examples {start} to {indices[-1]} ({_first_line(error)})",
                    indices,
                ) from error
        try:
            return default_collate([_native(item) for item in items])
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ExampleError(f"--data: {_why_not(items, start, error)}", indices) from error

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Return inputs, in the form that the core library takes, and targets.

        Raises:
            SettingsError: The batch is neither a sequence of inputs and targets, nor a mapping with the key of the targets;
                or the targets are no numbers.
        """
        if isinstance(batch, Mapping):
            for flag, key in (("--dict-key-y", self.key_y), ("--dict-key-x", self.key_x)):
                if key not in batch and (flag == "--dict-key-y" or key != Collate.key_x):
                    raise SettingsError(
                        f"{flag}: a batch is a mapping of {listed(list(map(str, batch)))}, without {key!r}; give {flag} "
                        "one of these, or examples that are pairs (x, y)"
                    )
            return flat(batch), _targets(batch[self.key_y])
        if not isinstance(batch, tuple | list) or len(batch) < 2 or isinstance(batch[0], str):
            kind = (
                f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
            )
            raise SettingsError(
                f"--data: a batch is a {kind}; expected a pair (x, y), several inputs and then y, or a mapping with "
                f"{self.key_y!r}"
            )
        x = flat(batch[0]) if len(batch) == 2 else parts(list(batch[:-1]))
        return x, _targets(batch[-1])


def _targets(y: Any) -> Tensor:
    """Return the targets of a batch as a tensor."""
    if isinstance(y, Tensor):
        return y
    if isinstance(y, Mapping):
        what = f"a mapping of {listed(list(map(str, y)))}; choose one of these"
    elif isinstance(y, list | tuple) and y and isinstance(y[0], str):
        what = f"strings, such as {y[0]!r}; give each class a number from 0"
    elif isinstance(y, list | tuple) and y and isinstance(y[0], Tensor):
        what = (
            f"lists of {len(y)} numbers, which torch joins place by place, not example by example; make each a tensor"
        )
    else:
        try:
            return torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError):
            what = f"a {type(y).__name__}; make them a tensor"
    raise SettingsError(f"--data: the targets are {what}, in the data set or with --collate")


def _native(value: Any) -> Any:
    """Return an example with arrays that torch can take: in this machine's byte order, with no negative strides."""
    if isinstance(value, np.ndarray):
        odd = not value.dtype.isnative or any(stride < 0 for stride in value.strides)
        return np.array(value, value.dtype.newbyteorder("="), order="C") if odd else value
    if isinstance(value, Mapping):
        items = dict(value.items())
        changed = {key: _native(item) for key, item in items.items()}
        return changed if any(changed[key] is not items[key] for key in items) else value
    if isinstance(value, tuple | list):
        inner = [_native(item) for item in value]
        if all(new is old for new, old in zip(inner, value, strict=True)):
            return value
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


# ------------------------------------------------------------------ messages


def _why_not(items: Sequence[Any], start: int, error: Exception) -> str:
    """Say why examples cannot be stacked: the first that differs from the first of all, and in what."""
    first = dict(_shapes(items[0], ""))
    for number, item in enumerate(items[1:], 1):
        shapes = dict(_shapes(item, ""))
        for name in first.keys() | shapes.keys():
            one, other = first.get(name, "missing"), shapes.get(name, "missing")
            if one != other:
                return (
                    f"examples {start} and {start + number} cannot be stacked into a batch: {name or 'the example'} is {one} "
                    f"in the one and {other} in the other; give all one form (pad, crop or resize), or join them with "
                    "--collate"
                )
    which = f"example {start}" if len(items) == 1 else f"examples {start} to {start + len(items) - 1}"
    return (
        f"{which} cannot be stacked into a batch ({_first_line(error)}); give tensors, arrays or numbers of one shape, or "
        "join them with --collate"
    )


def _shapes(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the name of every part of an example, and what has to be the same in all examples."""
    if isinstance(value, Tensor | np.ndarray):
        yield name, f"of shape {tuple(value.shape)}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _shapes(item, f"{name}[{key!r}]" if name else repr(key))
    elif isinstance(value, tuple | list):
        if not name and len(value) > 1:
            inner = [*(["x"] if len(value) == 2 else [f"input {i}" for i in range(len(value) - 1)]), "y"]
        else:
            yield name, f"of length {len(value)}"
            inner = [f"{name}[{i}]" for i in range(len(value))]
        for label, item in zip(inner, value, strict=True):
            yield from _shapes(item, label)
    else:
        numbers = isinstance(value, bool | int | float | np.generic)
        yield name, "a number" if numbers else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    """Return an error's type and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
