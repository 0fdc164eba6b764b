"""From import path or URL to model and data set: loading, fingerprints, and the batches of a segment."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np
import torch
import zarr
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from laplace_dist.config import Config
from laplace_dist.digests import feed
from laplace_dist.errors import ExampleError, SettingsError, listed
from laplace_dist.weights import load_weights

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_SAMPLE = 64


# ------------------------------------------------------------------ import paths


def load_callable(path: str, field: str = "--model") -> Callable[..., Any]:
    """Import `module:attribute`, looking in the current directory too.

    Args:
        path: Import path; the attribute may be dotted.
        field: Name of the setting, for messages.

    Raises:
        SettingsError: Bad form, no such module or attribute, or not callable.
    """
    if not _IMPORT_PATH.fullmatch(path):
        raise SettingsError(f"{field}: got {path!r}; expected an import path of the form module:callable")
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise SettingsError(f"{field}: got {path!r}; that module needs {error.name!r}, which is missing") from error
        raise SettingsError(
            f"{field}: got {path!r}; there is no module {error.name!r} in {os.getcwd()} or on the Python path"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = ", ".join(name for name in dir(found) if not name.startswith("_"))
            raise SettingsError(f"{field}: got {path!r}; {module_name!r} has no {attribute!r}, it has: {names[:300]}")
        found = getattr(found, part)
    if not callable(found):
        raise SettingsError(f"{field}: got {path!r}, which is a {type(found).__name__}; expected a callable")
    return found


def _call(path: str, field: str, arguments: Mapping[str, Any]) -> Any:
    """Call what an import path names, after checking that it takes these arguments."""
    function = load_callable(path, field)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise SettingsError(
            f"{field}: {path!r} cannot be called with {', '.join(arguments) or 'no arguments'} ({error}); "
            f"change its signature {inspect.signature(function)} or {field}-args"
        ) from error
    return function(**arguments)


# ------------------------------------------------------------------ model and weights


def load_model(config: Config) -> nn.Module:
    """Build the model, load `--weights` if given, and put it in eval mode.

    Raises:
        SettingsError: The callable or the file is not what is expected, or the weights do not fit.
    """
    model = _call(config.model, "--model", config.model_args)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"--model: {config.model!r} returned a {type(model).__name__}; expected a torch.nn.Module")
    if config.weights is not None:
        options = config.storage_options if "://" in config.weights else {}
        try:
            with fsspec.open(config.weights, "rb", **options) as file:
                content = file.read()
        except (OSError, ValueError, ImportError) as error:
            reason = type(error).__name__ if options else f"{type(error).__name__}: {error}"
            raise SettingsError(f"--weights: cannot read {config.weights!r} ({reason})") from None
        load_weights(model, content, f"--weights {config.weights}")
    return model.eval()


# ------------------------------------------------------------------ data sets


class ZarrSplit:
    """One split of a Zarr group as a map-style data set: arrays `x` and `y`, read as they are asked for.

    Args:
        url: Path or URL of the group that holds the splits.
        split: Name of the subgroup.
        storage_options: For the URL; never shown.
    """

    def __init__(self, url: str, split: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self._arguments = url, split, dict(storage_options or {})
        options = self._arguments[2] if "://" in url and not url.startswith("file:") else None
        try:
            group = zarr.open_group(url, mode="r", storage_options=options or None)
        except (OSError, ValueError, ImportError, TypeError) as error:
            raise SettingsError(
                f"--data: got {url!r}; expected an import path of the form module:callable, or the path or URL of a "
                f"Zarr group ({type(error).__name__} when it was opened)"
            ) from None
        if split not in group:
            raise SettingsError(f"--data: {url!r} has no split {split!r}; it has {listed(sorted(group.keys()))}")
        arrays = [group.get(f"{split}/{name}") for name in "xy"]
        if not all(isinstance(array, zarr.Array) and array.ndim for array in arrays):
            raise SettingsError(f"--data: split {split!r} of {url!r} needs the arrays 'x' and 'y'")
        self.x, self.y = arrays
        if self.x.shape[0] != self.y.shape[0]:
            counts = f"{self.x.shape[0]} x but {self.y.shape[0]} y"
            raise SettingsError(f"--data: split {split!r} of {url!r} has {counts}")

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor]:
        if not isinstance(index, slice) and not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        x, y = (torch.from_numpy(np.array(array[index])) for array in (self.x, self.y))
        return x, y if y.is_floating_point() else y.long()

    def __reduce__(self) -> tuple[Any, ...]:
        return ZarrSplit, self._arguments


def load_split(config: Config, split: str) -> Any:
    """Return one split as a map-style data set with at least one example.

    Args:
        config: `data` is an import path, called with `split=` and `data_args`, or the path or URL of a Zarr group.
        split: `train`, `val`, `test` or one of `config.ood`.

    Raises:
        SettingsError: It cannot be found or called, is not map-style, or is empty.
    """
    if _IMPORT_PATH.fullmatch(config.data):
        dataset = _call(config.data, "--data", {"split": split, **config.data_args})
    elif config.data_args:
        raise SettingsError(f"--data-args: {listed(list(config.data_args))} given, but {config.data!r} is no callable")
    else:
        dataset = ZarrSplit(config.data, split, config.storage_options)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset | Mapping | str) or not sized:
        raise SettingsError(
            f"--data: {config.data!r} returned a {type(dataset).__name__} for split {split!r}; expected a map-style "
            "data set, with __len__ and __getitem__"
        )
    if len(dataset) == 0:
        raise SettingsError(f"--data: {config.data!r} returned an empty data set for split {split!r}")
    return dataset


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Return `length`, and `sha256` over the length and up to 64 evenly spaced examples, first and last included.

    Raises:
        SettingsError: An example differs from one reading to the next, or holds something other than tensors, arrays,
            numbers, strings and containers of these.
        ExampleError: An example cannot be read.
    """
    length = len(dataset)
    count = min(length, _SAMPLE)
    digest = hashlib.sha256(str(length).encode())
    for index in sorted({i * (length - 1) // max(count - 1, 1) for i in range(count)}):
        digest.update(_example_digest(dataset, index))
    if _example_digest(dataset, 0) != _example_digest(dataset, 0):
        raise SettingsError(
            "--data: example 0 of a split differs between two readings; switch random augmentation off, "
            "since a run that is resumed must meet the same examples"
        )
    return {"length": length, "sha256": digest.hexdigest()}


def batches(dataset: Any, start: int, stop: int, batch_size: int) -> Iterator[tuple[int, Any, Tensor]]:
    """Yield the batches of a contiguous range of examples, in order.

    A batch that is a mapping is passed on whole as `x`, with its `labels` as `y`.

    Args:
        dataset: Map-style; one that slices (`TensorDataset`, a Zarr split) is sliced, one with `__getitems__` is asked
            for a batch at a time.
        start: First example.
        stop: One past the last example.
        batch_size: Examples per batch; the last one may be smaller.

    Yields:
        `(offset, x, y)`: the index in the data set of the batch's first example, and its collated inputs and targets.

    Raises:
        ExampleError: The data set raised an error; the message names the example and the error is its cause.
        SettingsError: Examples are neither pairs nor mappings with `labels`.
    """
    assert 0 <= start < stop <= len(dataset), f"range {start}..{stop} of {len(dataset)} examples"
    for offset in range(start, stop, batch_size):
        batch = _read_batch(dataset, offset, min(offset + batch_size, stop))
        if isinstance(batch, Mapping) and "labels" in batch:
            yield offset, batch, batch["labels"]
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            yield offset, batch[0], batch[1]
        else:
            kind = f"a mapping of {listed(list(batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise SettingsError(f"--data: an example is {kind}; expected a pair (x, y) or a mapping with 'labels'")


def _read_batch(dataset: Any, start: int, stop: int) -> Any:
    if isinstance(dataset, TensorDataset | ZarrSplit):
        with _naming(start, stop):
            return dataset[start:stop]
    if hasattr(dataset, "__getitems__"):
        with _naming(start, stop):
            items = dataset.__getitems__(list(range(start, stop)))
    else:
        items = [_read_example(dataset, index) for index in range(start, stop)]
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        raise ExampleError(
            f"--data: examples {start} to {stop - 1} cannot be stacked into a batch ({error}); "
            "give tensors, arrays or numbers of one shape",
            tuple(range(start, stop)),
        ) from error


def _read_example(dataset: Any, index: int) -> Any:
    with _naming(index, index + 1):
        return dataset[index]


@contextmanager
def _naming(start: int, stop: int) -> Iterator[None]:
    """Turn an error of the user's data set, whatever it is, into one that names the examples."""
    try:
        yield
    except Exception as error:
        which = f"example {start}" if stop == start + 1 else f"examples {start} to {stop - 1}"
        message = f"--data: {which} cannot be read ({type(error).__name__}: {error})"
        raise ExampleError(message, tuple(range(start, stop))) from error


# ------------------------------------------------------------------ digests


def _example_digest(dataset: Any, index: int) -> bytes:
    digest = hashlib.sha256()
    try:
        feed(digest, _read_example(dataset, index))
    except TypeError as error:
        raise SettingsError(f"--data: example {index} holds {error}; expected tensors, arrays or numbers") from error
    return digest.digest()
