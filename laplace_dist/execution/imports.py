"""Importing modules without garbage collections, which find nothing then and take a fifth of the time of importing torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from running meanwhile; what was made counts as old afterwards, without a look at it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was and not gc.get_freeze_count():  # this process has frozen nothing, which would be undone
            gc.freeze()
            gc.unfreeze()
        if was:
            gc.enable()
