"""Threads that share a model take turns at it, and settings of the process hold as long as any thread needs them.

A block of :func:`laplace.capture.evaluation.eval_mode` hooks into the model, switches its modes and may put other weights in
its place, so that a second thread would see the first one's inputs, or a network that is half in training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Lock, RLock
from types import TracebackType
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, AbstractContextManager] = WeakKeyDictionary()
_making = Lock()


def turn(model: nn.Module) -> AbstractContextManager:
    """Wait until no other thread is at the model, and keep others waiting inside the block.

    The lock is that of the first module with parameters, which wrappers of one model share.
    """
    shared = next((module for module in model.modules() if module._parameters), model)
    with _making:
        return _locks.setdefault(shared, RLock())


class WhileAny:
    """A setting of the whole process: the first block to begin makes it, and the last one to end takes it back.

    Args:
        make: Makes a context manager of the setting.
    """

    def __init__(self, make: Callable[[], AbstractContextManager]):
        """See the class."""
        self._make, self._lock, self._inside = make, Lock(), 0

    def __enter__(self) -> None:
        """Make the setting if nobody has."""
        with self._lock:
            if not self._inside:
                self._setting = self._make()
                self._setting.__enter__()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the setting back if nobody else needs it."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._setting.__exit__(None, None, None)
