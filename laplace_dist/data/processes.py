"""The processes that read ahead: what can be sent to them, how they start, and that they end.

They come from a `forkserver`. A worker of Ray has threads of Ray, of fsspec's event loop and of torch when it begins to read,
perhaps also a CUDA context; a plain fork copies their locks in whatever state they are in, and file systems such as s3fs
refuse to work in a forked process. A fork server is started afresh, has no such threads, and imports torch for all.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from laplace_dist.errors import SettingsError

METHOD = "forkserver"
_PRELOAD = ["torch", "laplace_dist.data.read_ahead"]  # imported once, by the fork server; neither starts a thread
_CANNOT_SEND = (pickle.PicklingError, AttributeError, TypeError, NotImplementedError)


@contextmanager
def starting(dataset: Any) -> Iterator[None]:
    """Start processes inside the block that a data set is sent to.

    They do not run this process's main module, unless the data set needs it: a script without a guard would start again.

    Raises:
        SettingsError: It cannot be sent.
    """
    needs_main = check_sendable(dataset)
    multiprocessing.get_context(METHOD).set_forkserver_preload(_PRELOAD)
    main = sys.modules["__main__"]
    if needs_main:
        yield
        return
    spec, path = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if path is not None:
            main.__file__ = path


def prepare(threads: int, dtype: torch.dtype, number: int) -> None:
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


# ------------------------------------------------------------------ what can be sent


def check_sendable(dataset: Any) -> bool:
    """Refuse a data set that cannot be sent to another process, without copying its arrays.

    Returns:
        Whether something in it is defined in the main module.

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
    return probe.needs_main


def check_batch(x: Any, start: int, stop: int) -> None:
    """Refuse inputs that this process cannot send: they would be lost without a word, and waited for without end.

    Args:
        x: The inputs.
        start: First example.
        stop: One past the last example.

    Raises:
        SettingsError: They hold something that cannot be pickled.
    """
    if get_worker_info() is None:
        return
    try:
        _Probe().dump(x)
    except _CANNOT_SEND as error:
        raise SettingsError(
            f"--loader-workers: the batch of examples {start} to {stop - 1} cannot be sent from the process that read it "
            f"({type(error).__name__}: {error}). Make it tensors with --collate, or give --loader-workers 0."
        ) from error


class _Probe(ForkingPickler):
    """Pickles to nowhere, and passes arrays over."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())
        self.needs_main = False

    def persistent_id(self, value: Any) -> int | None:
        """Say what is passed over, and notice what the main module has defined."""
        kind = value if isinstance(value, type | FunctionType) else type(value)
        self.needs_main = self.needs_main or kind.__module__ == "__main__"
        return 0 if isinstance(value, Tensor | np.ndarray) else None


class _Nowhere:
    def write(self, content: Any) -> int:
        return len(content)
