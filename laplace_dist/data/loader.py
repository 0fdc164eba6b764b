"""The batches of a contiguous range of examples; an error names the examples that it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from laplace_dist.data.sources import ZarrSplit
from laplace_dist.errors import ExampleError, SettingsError, listed


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
        items = [read_example(dataset, index) for index in range(start, stop)]
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        raise ExampleError(
            f"--data: examples {start} to {stop - 1} cannot be stacked into a batch ({error}); "
            "give tensors, arrays or numbers of one shape",
            tuple(range(start, stop)),
        ) from error


def read_example(dataset: Any, index: int) -> Any:
    """Return one example.

    Raises:
        ExampleError: The data set raised an error; the message names the example.
    """
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
