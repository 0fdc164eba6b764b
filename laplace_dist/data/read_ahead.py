"""Reading ahead with `torch.utils.data.DataLoader`: one range of examples after the other, by processes that stay.

The processes come from a `forkserver`. A worker of Ray has threads of Ray, of fsspec's event loop and of torch when it begins
to read, perhaps also a CUDA context; a plain fork copies their locks in whatever state they are in, and file systems such as
s3fs refuse to work in a forked process. A fork server is started afresh, has no such threads, and imports torch for all.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from laplace_dist.data.collate import Collate
from laplace_dist.data.loader import DEFAULT, read_batch
from laplace_dist.errors import ExampleError, SettingsError

_CANNOT_SEND = (pickle.PicklingError, AttributeError, TypeError, NotImplementedError)
_PRELOAD = ["torch", __name__]  # imported once, by the fork server; neither starts a thread
Unit = tuple[tuple[int, int], ...]  # ranges of batches that one process reads, one after the other


class _Ranges:
    """The sampler: the batches of the range that was set last, grouped into units.

    Args:
        batch_size: Examples per batch.
        rows: Examples that the data set reads at once; batches that begin in the same of these groups make a unit, so that
            no two processes decode the same chunk.
    """

    def __init__(self, batch_size: int, rows: int) -> None:
        self.batch_size, self.rows = batch_size, rows
        self.start = self.stop = 0

    def __iter__(self) -> Iterator[Unit]:
        offsets = range(self.start, self.stop, self.batch_size)
        for _, unit in itertools.groupby(offsets, key=lambda offset: offset // self.rows):
            yield tuple((offset, min(offset + self.batch_size, self.stop)) for offset in unit)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a process, as plain data, since not every exception survives that.

    Attributes:
        text: The message.
        examples: Indices of the examples concerned.
        refusal: Whether the settings are wrong, so that trying again is of no use.
        cause: What the data set raised, where that was in this process.
    """

    text: str
    examples: tuple[int, ...]
    refusal: bool
    cause: BaseException | None = None

    def error(self) -> Exception:
        """Return the error that it stands for."""
        error = SettingsError(self.text) if self.refusal else ExampleError(self.text, self.examples)
        error.__cause__ = self.cause
        return error


class _Units(Dataset):
    """The data set as the `DataLoader` sees it: an index is a unit, an item its batches, then a failure if there was one."""

    def __init__(self, dataset: Any, collate: Collate) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, unit: Unit) -> list[tuple[int, Any, Tensor] | _Failure]:
        found: list[Any] = []
        try:
            for start, stop in unit:
                x, y = read_batch(self.dataset, start, stop, self.collate)
                found.append((start, _sendable(x, start, stop), y))
        except (ExampleError, SettingsError) as error:
            cause = None if get_worker_info() else error.__cause__
            examples = tuple(getattr(error, "examples", ()))
            found.append(_Failure(str(error), examples, isinstance(error, SettingsError), cause))
        return found


class ReadAhead:
    """The batches of one range of a data set after the other, read ahead by processes that stay from range to range.

    Args:
        dataset: Map-style, as of `laplace_dist.data.loader.batches`.
        batch_size: Examples per batch.
        collate: How examples become batches.
        workers: Processes; 0 reads in this one, when a batch is asked for.
        threads: Threads that torch computes with in these processes, as in this one, since their number can change bits.
        pin: Put batches into pinned memory, from which a GPU copies while it computes.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate: Collate = DEFAULT,
        *,
        workers: int = 0,
        threads: int = 1,
        pin: bool = False,
    ) -> None:
        self._loader: DataLoader | None = None
        self.workers, self._turn = workers, 0
        self._length = len(dataset)
        rows = getattr(dataset, "rows_per_read", 1) if workers else 1
        self._ranges = _Ranges(batch_size, rows)
        self._units = _Units(dataset, collate)
        self._options: dict[str, Any] = {"pin_memory": pin, "num_workers": workers}
        if workers:
            self._options |= {
                "multiprocessing_context": "forkserver",
                "persistent_workers": True,
                "prefetch_factor": 1
                if rows > batch_size
                else 2,  # units per process, each of several batches or of one
                "worker_init_fn": partial(_prepare, threads, torch.get_default_dtype()),
            }

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Any, Tensor]]:
        """Yield the batches of a contiguous range of examples, in order; only one range is read at a time.

        Yields:
            `(offset, x, y)`, as of `laplace_dist.data.loader.batches`.

        Raises:
            ExampleError: An example cannot be read, or a process died; the message says which, and what to do.
            SettingsError: Batches do not have inputs and targets, or the data set cannot be sent to a process.
        """
        assert 0 <= start < stop <= self._length, f"range {start}..{stop} of {self._length} examples"
        self._turn += 1
        turn, at = self._turn, start
        units = self._begin(start, stop)
        while at < stop:
            for item in self._next(units, at, stop):
                if isinstance(item, _Failure):
                    raise item.error()
                yield item
                assert turn == self._turn, "another range was begun before this one was finished"
                at += self._ranges.batch_size

    def close(self) -> None:
        """End the processes.

        Left to the garbage collection, which may take the queues first, each is waited for until it looks around: 5 s.
        """
        loader, self._loader = self._loader, None
        if loader is not None and loader._iterator is not None:
            loader._iterator._shutdown_workers()

    def __del__(self) -> None:
        self.close()

    def _begin(self, start: int, stop: int) -> Iterator[Any]:
        self._ranges.start, self._ranges.stop = start, stop
        if self._loader is None:
            # A generator of its own: a loader draws a seed when it begins, and the model's draws are not its to move.
            self._loader = DataLoader(
                self._units,
                batch_size=None,
                sampler=self._ranges,
                collate_fn=_as_it_is,
                generator=torch.Generator(),
                **self._options,
            )
        if not self.workers or self._loader._iterator is not None:
            return iter(self._loader)
        alone = check_sendable(self._units)
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
        with _main_left_alone() if alone else _nothing():
            return iter(self._loader)

    def _next(self, units: Iterator[Any], at: int, stop: int) -> Any:
        try:
            return next(units)
        except (RuntimeError, OSError, EOFError) as error:
            self.close()
            if not self.workers:
                raise
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['its connection ended'])[0]}"
            raise ExampleError(
                f"--loader-workers: a process that read ahead died while examples from {at} were being read ({reason}). "
                "If memory or /dev/shm is short, which batches pass through, give fewer of them; 0 reads in the worker itself.",
                tuple(range(at, stop)),
            ) from error


def check_sendable(dataset: Any) -> bool:
    """Refuse a data set that cannot be sent to another process, without copying its arrays.

    Returns:
        Whether nothing in it is defined in the main module, which a process then need not run again.

    Raises:
        SettingsError: It holds something that cannot be pickled.
    """
    probe = _Probe()
    try:
        probe.dump(dataset)
    except _CANNOT_SEND as error:
        raise SettingsError(
            f"--loader-workers: the data set cannot be sent to the processes that read ahead ({type(error).__name__}: "
            f"{error}). Define its functions and classes at the top of a module and open files on first use, or give "
            "--loader-workers 0."
        ) from error
    return not probe.needs_main


class _Probe(ForkingPickler):
    """Pickles to nowhere, and passes arrays over."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())
        self.needs_main = False

    def persistent_id(self, value: Any) -> int | None:
        """Say what is passed over, and notice what the main module has defined."""
        self.needs_main = self.needs_main or getattr(value, "__module__", None) == "__main__"
        return 0 if isinstance(value, Tensor | np.ndarray) else None


class _Nowhere:
    def write(self, content: Any) -> int:
        return len(content)


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Keep new processes from running this process's main module: a script without a guard would start again."""
    main = sys.modules["__main__"]
    spec, path = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if path is not None:
            main.__file__ = path


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _prepare(threads: int, dtype: torch.dtype, number: int) -> None:
    """Have a new process compute as the one that it reads for, and end with it."""
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait until the process that this one reads for is gone, and go.

    torch's own watch looks at the parent, which is the fork server; and that one lives as long as any of its children.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


def _as_it_is(item: Any) -> Any:
    return item


def _sendable(x: Any, start: int, stop: int) -> Any:
    """Return inputs that can be sent from a process; what cannot would be lost without a word, and waited for without end."""
    if get_worker_info() is None:
        return x
    try:
        _Probe().dump(x)
    except _CANNOT_SEND as error:
        raise SettingsError(
            f"--loader-workers: the batch of examples {start} to {stop - 1} cannot be sent from the process that read it "
            f"({type(error).__name__}: {error}). Make it tensors with --collate, or give --loader-workers 0."
        ) from error
    return x
