"""The batches of a contiguous range of examples; an error names the examples that it is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

from laplace_dist.data.collate import Collate
from laplace_dist.data.rows import Rows
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import ExampleError, SettingsError

DEFAULT = Collate()


def batches(
    dataset: Any, start: int, stop: int, batch_size: int, collate: Collate = DEFAULT
) -> Iterator[tuple[int, Any, Tensor]]:
    """Yield the batches of a contiguous range of examples, in order.

    Args:
        dataset: Map-style; one that slices (`TensorDataset`, what lies at a URL) is sliced, one with `__getitems__` is asked
            for a batch at a time.
        start: First example.
        stop: One past the last example.
        batch_size: Examples per batch; the last one may be smaller.
        collate: How examples become batches.

    Yields:
        `(offset, x, y)`: the index in the data set of the batch's first example, and its collated inputs and targets.

    Raises:
        ExampleError: The data set raised an error; the message names the example and the error is its cause.
        SettingsError: Batches do not have inputs and targets, or not one target per example.
    """
    assert 0 <= start < stop <= len(dataset), f"range {start}..{stop} of {len(dataset)} examples"
    for offset in range(start, stop, batch_size):
        yield offset, *read_batch(dataset, offset, min(offset + batch_size, stop), collate)


def read_batch(dataset: Any, start: int, stop: int, collate: Collate = DEFAULT) -> tuple[Any, Tensor]:
    """Return the inputs and targets of one batch; arguments and errors as of `batches`."""
    x, y = collate.split(_read(dataset, start, stop, collate))
    if y.ndim == 0 or len(y) != stop - start:
        shown = "one" if y.ndim == 0 else f"{len(y)}"
        raise SettingsError(
            f"--data: examples {start} to {stop - 1} gave {shown} target(s) in place of {stop - start}; give one target per "
            "example: neither a data set's __getitems__ nor --collate may leave any out, or add some. What is not to count has "
            "a weight of 0 (--example-weights), or is left out of the data set."
        )
    return x, y


def _read(dataset: Any, start: int, stop: int, collate: Collate) -> Any:
    if isinstance(dataset, TensorDataset | ZarrSplit | Rows) and collate.path is None:
        with naming(start, stop):
            return dataset[start:stop]
    if hasattr(dataset, "__getitems__"):
        with naming(start, stop):
            items = dataset.__getitems__(list(range(start, stop)))
    else:
        items = [read_example(dataset, index) for index in range(start, stop)]
    return collate.batch(items, start)


def read_example(dataset: Any, index: int) -> Any:
    """Return one example.

    Raises:
        ExampleError: The data set raised an error; the message names the example.
    """
    with naming(index, index + 1):
        return dataset[index]


@contextmanager
def naming(start: int, stop: int) -> Iterator[None]:
    """Turn an error of the user's data set, whatever it is, into one that names the examples."""
    try:
        yield
    except Exception as error:
        which = f"example {start}" if stop == start + 1 else f"examples {start} to {stop - 1}"
        message = f"--data: {which} cannot be read ({type(error).__name__}: {error})"
        raise ExampleError(message, tuple(range(start, stop))) from error
