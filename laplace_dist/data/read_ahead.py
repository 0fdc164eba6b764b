"""Reading ahead with `torch.utils.data.DataLoader`: one range of examples after the other, by processes that stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from laplace_dist.data.collate import Collate
from laplace_dist.data.loader import DEFAULT, read_batch
from laplace_dist.data.processes import METHOD, check_batch, prepare, starting
from laplace_dist.errors import ExampleError, SettingsError

Unit = tuple[tuple[int, int], ...]  # ranges of batches that one process reads, one after the other


class _Ranges:
    """The sampler: the batches of the range that was set last, grouped into units.

    Args:
        batch_size: Examples per batch.
        chunk_of: Returns the chunk that an example is read with; batches that begin in the same one make a unit, so that no two
            processes decode the same chunk.
    """

    def __init__(self, batch_size: int, chunk_of: Callable[[int], int]) -> None:
        self.batch_size, self.chunk_of = batch_size, chunk_of
        self.start = self.stop = 0

    def __iter__(self) -> Iterator[Unit]:
        offsets = range(self.start, self.stop, self.batch_size)
        for _, unit in itertools.groupby(offsets, key=self.chunk_of):
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
                check_batch(x, start, stop)
                found.append((start, x, y))
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
        chunk_of = getattr(dataset, "chunk_of", None) if workers else None
        self._ranges = _Ranges(batch_size, chunk_of or _each)
        self._units = _Units(dataset, collate)
        self._options: dict[str, Any] = {"pin_memory": pin, "num_workers": workers}
        if workers:
            self._options |= {
                "multiprocessing_context": METHOD,
                "persistent_workers": True,
                # Units per process, each of several batches or of one.
                "prefetch_factor": 1 if chunk_of and chunk_of(0) == chunk_of(batch_size) else 2,
                "worker_init_fn": partial(prepare, threads, torch.get_default_dtype()),
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
        with starting(self._units):
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


def _each(index: int) -> int:
    return index


def _as_it_is(item: Any) -> Any:
    return item
