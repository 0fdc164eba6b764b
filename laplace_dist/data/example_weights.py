"""How much each example of the training split counts, where `--example-weights` names what says so."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laplace_dist.data.loader import naming
from laplace_dist.data.rows import Rows
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import SettingsError

FLAG = "--example-weights"
_STEP = 2**20  # weights that are read at once, where all are
SLOW_SECONDS = 10.0  # of reading all of them, from which on that is said
_SCALE = 1e12  # what the largest weight may be, and the least it may be the inverse of: their products are of float32
_REMEDY = "a weight is a finite number that is not negative, and 0 leaves an example out"


def read(dataset: Any, name: str, start: int, stop: int, split: str = "train") -> Tensor:
    """Return the weights of a contiguous range of examples, ``(examples,)`` float64.

    Args:
        dataset: Map-style. In files `name` is a column, in Zarr an array of the split, else an attribute: a sequence, an array
            or a tensor with a number for each example.
        name: What `--example-weights` gives.
        start: First example.
        stop: One past the last example.
        split: Its name, for messages.

    Raises:
        SettingsError: There is none of that name, there is not one number for each example, or one is no weight.
        ExampleError: They cannot be read.
    """
    values = _values(dataset, name, start, stop)
    if values is None:
        raise SettingsError(
            f"{FLAG}: the split {split!r} has no {_kind(dataset)} {name!r}; give it one with a number for each example, or "
            f"leave {FLAG} out (null in a --config), which is a weight of 1 for each"
        )
    try:
        found = torch.from_numpy(np.array(values, np.float64))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{FLAG}: {name!r} of the split {split!r} holds no numbers ({error}); {_REMEDY}") from None
    if tuple(found.shape) != (stop - start,):
        raise SettingsError(
            f"{FLAG}: {name!r} of the split {split!r} has shape {tuple(found.shape)} for {stop - start} examples; expected one "
            "number for each"
        )
    wrong = ~(torch.isfinite(found) & (found >= 0))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        place = f" ({dataset.where(start + first)})" if isinstance(dataset, Rows) else ""
        raise SettingsError(
            f"{FLAG}: example {start + first}{place} of the split {split!r} has the weight {found[first].item()}; {_REMEDY}"
        )
    return found


def facts(dataset: Any, name: str) -> dict[str, Any]:
    """Return what the weights of the training split are told by.

    Returns:
        `name`; `sha256` of all of them; their `sum`; `zero`, how many are 0; and, under `sampled`, some of them by the index of
        their example.

    Raises:
        SettingsError: They are no weights, or all 0; see `read`.
        ExampleError: They cannot be read.
    """
    if isinstance(dataset, Rows):
        _say_if_slow(dataset, name)
    digest, parts, most, zero = hashlib.sha256(), [], 0.0, 0
    for start in range(0, len(dataset), _STEP):
        part = read(dataset, name, start, min(start + _STEP, len(dataset)))
        digest.update(part.numpy().astype("<f8").tobytes())
        parts.append(float(part.sum()))
        most, zero = max(most, float(part.max())), zero + int((part == 0).sum())
    if most == 0:
        raise SettingsError(f"{FLAG}: every weight of the split 'train' is 0, which leaves no example; {_REMEDY}")
    if not 1 / _SCALE <= most <= _SCALE:
        raise SettingsError(
            f"{FLAG}: the largest weight of the split 'train' is {most:.6g}, which single precision has no digits for beside "
            f"the data; divide all by a common factor, so that it lies between {1 / _SCALE:g} and {_SCALE:g}"
        )
    sampled = {str(index): value for index, value in _sampled(dataset, name)}
    return {"name": name, "sha256": digest.hexdigest(), "sum": float(np.sum(parts)), "zero": zero, "sampled": sampled}


def _say_if_slow(dataset: Rows, name: str) -> None:
    """Say that reading all weights takes long, from what a few chunks take."""
    begun = time.monotonic()
    few = len({dataset.chunk_of(index) for index, _ in _sampled(dataset, name)})
    seconds, chunks = time.monotonic() - begun, dataset.chunk_of(len(dataset) - 1) + 1
    if (left := seconds / few * chunks) > SLOW_SECONDS:
        logging.getLogger("laplace_dist").info(
            f"data: reading the weights {name!r} of all {len(dataset):,} examples, by whose digest they are known again; about "
            f"{left:.0f} s"
        )


def check_same(dataset: Any, wanted: Mapping[str, Any], where: str) -> None:
    """Refuse a training split whose weights are not those that the driver saw, as far as those of sampled examples tell.

    Args:
        dataset: The split as this process has it.
        wanted: `facts(...)` as the driver has them.
        where: This process, in a person's words.

    Raises:
        SettingsError: Naming an example whose weight differs.
    """
    for index, value in _sampled(dataset, wanted["name"]):
        if wanted["sampled"].get(str(index)) != value:
            raise SettingsError(
                f"{FLAG}: example {index} of the split 'train' on {where} has the weight {value!r}, the driver's has "
                f"{wanted['sampled'].get(str(index))!r}. Every node needs the same data. Nothing of it was added."
            )


def refuse_weighted(dataset: Any, name: str, split: str) -> None:
    """Refuse weights in a split that is not for training: metrics and the search of a prior count every example once.

    Raises:
        SettingsError: It has weights of this name, and one of them is not 1.
        ExampleError: They cannot be read.
    """
    if (found := _not_one(dataset, name, split)) is not None:
        raise SettingsError(
            f"{FLAG}: example {found[0]} of the split {split!r} has the weight {found[1]!r}, but tuning and "
            "evaluation count every example once; leave that column out of this split, make it 1, or use --skip-tune "
            "and --skip-evaluate"
        )


def refuse_forgotten(dataset: Any, name: str, window: str) -> None:
    """Refuse to count every example of a new window once whose data have the weights that another window counts by.

    Args:
        dataset: The training split.
        name: That the other window gave.
        window: The other window.

    Raises:
        SettingsError: The split has weights of this name, and one of them is not 1.
        ExampleError: They cannot be read.
    """
    if (found := _not_one(dataset, name, "train")) is not None:
        raise SettingsError(
            f"{FLAG}: got none, which is a weight of 1 for each example, but window {window} counts by {name!r}, and example "
            f"{found[0]} of these data has the weight {found[1]!r} there. Give {FLAG} {name}, or leave that "
            f"{_kind(dataset)} out of the data."
        )


def _not_one(dataset: Any, name: str, split: str) -> tuple[int, float] | None:
    """Return the first example whose weight of this name is not 1, with it; None if there is none, or nothing of the name."""
    for start in range(0, len(dataset), _STEP):
        if _values(dataset, name, start, start + 1) is None:
            return None
        part = read(dataset, name, start, min(start + _STEP, len(dataset)), split)
        if bool((other := part != 1).any()):
            first = int(other.nonzero()[0])
            return start + first, part[first].item()
    return None


def _sampled(dataset: Any, name: str) -> list[tuple[int, float]]:
    """Return a few examples with their weights, those of one chunk read together."""
    chunk_of = getattr(dataset, "chunk_of", None) or (lambda index: index)
    indices = dataset.sampled() if isinstance(dataset, Rows) else _spread(len(dataset))
    found = []
    for _, group in itertools.groupby(indices, key=chunk_of):
        own = list(group)
        values = read(dataset, name, own[0], own[-1] + 1)
        found += [(index, float(values[index - own[0]])) for index in own]
    return found


def _spread(length: int, count: int = 64) -> list[int]:
    """Return the indices of a few evenly spaced examples, first and last included."""
    count = min(length, count)
    return sorted({i * (length - 1) // max(count - 1, 1) for i in range(count)})


def _values(dataset: Any, name: str, start: int, stop: int) -> Any:
    """Return what a range of examples has under this name; None where there is nothing."""
    if isinstance(dataset, Rows | ZarrSplit):
        with naming(start, stop):
            return dataset.column(name, start, stop)
    given = getattr(dataset, name, None)
    if given is None or callable(given) or isinstance(given, str | bytes):
        return None
    if not hasattr(given, "__len__") or len(given) != len(dataset):
        size = len(given) if hasattr(given, "__len__") else 1
        raise SettingsError(
            f"{FLAG}: the attribute {name!r} of the data set has {size} entries for {len(dataset)} examples; expected one "
            "number for each"
        )
    part = given[start:stop]
    return part.detach().cpu().numpy() if isinstance(part, Tensor) else part


def _kind(dataset: Any) -> str:
    return "array" if isinstance(dataset, ZarrSplit) else "column" if isinstance(dataset, Rows) else "attribute"
