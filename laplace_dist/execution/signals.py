"""SIGINT and SIGTERM: the first ends the job in order, a second one at once.

While tasks are in flight a signal is only noted, and the loop finishes what it can; anywhere else it is raised as
`Interrupted`, which ends the job as any error would. Whatever may hang on the way out, the process is gone in time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from laplace_dist.errors import Interrupted
from laplace_dist.execution.timeouts import LEAVE_SECONDS

HEEDED = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Seen:
    """Which signal was seen.

    Attributes:
        number: Of the signal; 0 for none.
    """

    number: int = 0
    _deferred: int = field(default=0, repr=False)
    _watch: threading.Timer | None = field(default=None, repr=False)

    def handle(self, number: int, _: object) -> None:
        """Heed a signal."""
        name = signal.Signals(number).name
        if self.number:
            _tell(f"{name}: leaving at once")
            _leave(self.number)
        self.number = number
        _tell(f"{name}: no new tasks; what is in flight may finish. Once more, and this process leaves at once")
        self._watch = threading.Timer(LEAVE_SECONDS, _leave, [number])
        self._watch.daemon = True
        self._watch.start()
        if not self._deferred:
            raise Interrupted(number)


_seen = Seen()  # signals are the process's, so there is one of these


@contextmanager
def heeded() -> Iterator[None]:
    """Heed signals meanwhile; does nothing in a thread that is not the main one, which cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _seen
    _seen = Seen()
    before = {number: signal.signal(number, _seen.handle) for number in HEEDED}
    try:
        yield
    finally:
        if _seen._watch is not None:
            _seen._watch.cancel()
        _seen = Seen()  # what was heeded here is not another job's, which this process may begin later
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[Seen]:
    """Only note signals meanwhile; one that was noted is raised at the end, unless an error is on its way."""
    seen = _seen
    seen._deferred += 1
    try:
        yield seen
    finally:
        seen._deferred -= 1
    if seen.number and not seen._deferred:
        raise Interrupted(seen.number)


@contextmanager
def kept() -> Iterator[None]:
    """Set the handlers back that something within replaces, as `ray.init` does with SIGTERM's."""
    before = {number: signal.getsignal(number) for number in HEEDED}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler == _seen.handle:
                    signal.signal(number, handler)


def status(number: int) -> int:
    """Return the exit status of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


def _tell(text: str) -> None:
    """Write a line for people without the locks of `print`, which the interrupted code may hold."""
    os.write(2, f"{text}\n".encode())


def _leave(number: int) -> None:
    """End this process without another word; what it started notices that it is gone, and ends too."""
    os._exit(status(number))
