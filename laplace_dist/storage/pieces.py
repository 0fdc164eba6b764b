"""Stored arrays piece by piece, in order, while the pieces behind the one in hand are on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Piece:
    """A stored chunk that is not read yet.

    Attributes:
        rows: Of the stored array, along its first axis; `()` where it has none.
        nbytes: What it takes when it is read.
        load: Reads and decodes it, or raises what is wrong with it.
    """

    rows: Any
    nbytes: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Ahead:
    """How much is read before it is asked for.

    Attributes:
        threads: That read and decode; with none, everything is read when it is asked for.
        arrays: That are opened, the one in hand among them.
        nbytes: Of pieces that are asked of the storage or wait to be taken; one of them may be larger.
    """

    threads: int
    arrays: int
    nbytes: int


Open = Callable[[], Sequence[Piece]]
Loaded = Iterator[tuple[Any, np.ndarray]]


def in_order(opens: Iterable[Open], ahead: Ahead) -> Iterator[Loaded]:
    """Yield, for every array in order, an iterator over `(rows, piece)`, which raises what is wrong with that array alone.

    What an array has left when the next one is taken is not read. Memory is the piece in hand and `ahead.nbytes`; while a
    piece is decoded, its stored bytes too.

    Args:
        opens: A call for each array that opens it and says which pieces it has.
        ahead: How much is read ahead.
    """
    if not ahead.threads:
        yield from map(_when_asked, opens)
        return
    pool = ThreadPoolExecutor(ahead.threads)
    reader = _Reader(iter(opens), ahead, pool)
    try:
        while (loaded := reader.next_array()) is not None:
            yield loaded
    finally:
        reader.close()
        pool.shutdown(cancel_futures=True)


def _when_asked(open_: Open) -> Loaded:
    """Open and read one array as its pieces are taken."""
    for piece in open_():
        yield piece.rows, piece.load()


class _Array:
    """An array under way: opened or being opened, with the pieces that were asked for and those that were not yet."""

    def __init__(self, opened: Future[Sequence[Piece]]) -> None:
        self.opened = opened
        self.asked: deque[tuple[Piece, Future[np.ndarray]]] = deque()
        self._later: deque[Piece] | None = None

    @property
    def later(self) -> deque[Piece]:
        """The pieces that were not asked for yet; of an array that cannot be opened there are none."""
        if self._later is None:
            failed = self.opened.cancelled() or self.opened.exception()
            self._later = deque() if failed else deque(self.opened.result())
        return self._later


class _Reader:
    """Asks for what comes next as far as the bounds allow, whenever something was taken or an array is open."""

    def __init__(self, opens: Iterator[Open], ahead: Ahead, pool: ThreadPoolExecutor) -> None:
        self._opens, self._ahead, self._pool = opens, ahead, pool
        self._arrays: deque[_Array] = deque()
        self._lock = (
            Lock()
        )  # of the arrays and of what they hold, since whichever thread opened one asks for its pieces
        self._held = 0
        self._begun = False

    def close(self) -> None:
        """Ask for nothing more."""
        with self._lock:
            self._arrays.clear()

    def next_array(self) -> Loaded | None:
        """Return the pieces of the next array, or None after the last."""
        if self._begun:
            with self._lock:
                for piece, future in self._arrays.popleft().asked:
                    future.cancel()
                    self._held -= piece.nbytes
        self._begun = True
        self._open()
        self._ask()
        return self._load(self._arrays[0]) if self._arrays else None

    def _load(self, array: _Array) -> Loaded:
        assert array is self._arrays[0], "the next array was taken before this one's pieces"
        array.opened.result()
        self._ask()
        while array.asked:
            piece, future = array.asked[0]
            value = future.result()
            with self._lock:
                array.asked.popleft()
                self._held -= piece.nbytes
            self._ask()
            del future
            yield piece.rows, value
            del value

    def _open(self) -> None:
        """Have the next arrays opened."""
        while len(self._arrays) < self._ahead.arrays and (open_ := next(self._opens, None)):
            array = _Array(self._pool.submit(open_))
            with self._lock:
                self._arrays.append(array)
            array.opened.add_done_callback(lambda _: self._ask())

    def _ask(self) -> None:
        """Ask for the next pieces of the arrays that are open, in order."""
        with self._lock:
            for array in self._arrays:
                if not array.opened.done():
                    return
                while array.later:
                    if self._held and self._held + array.later[0].nbytes > self._ahead.nbytes:
                        return
                    piece = array.later.popleft()
                    array.asked.append((piece, self._pool.submit(piece.load)))
                    self._held += piece.nbytes
