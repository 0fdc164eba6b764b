"""Threads that share a model take turns at it.

A block of :func:`laplace.capture.evaluation.eval_mode` hooks into the model, switches its modes and may put other weights in
its place, so that a second thread would see the first one's inputs, or a network that is half in training mode.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from threading import Lock, RLock
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
