"""Blocks of settings: some of the whole process, which hold as long as any block in any thread needs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from threading import Lock
from types import TracebackType
from typing import Any


class Block:
    """Base of context managers that decorate functions too, which begin and end in a fraction of a generator's time."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Have a function run inside a block of its own."""

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with type(self)():
                return function(*args, **kwargs)

        return inside


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
