"""What a job says, on standard output: for the command line, where nobody has set up logging."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class _Printing(logging.Handler):
    """Prints to whatever is standard output at the moment, which a live display may have taken over."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stdout, flush=True)


@contextmanager
def printed() -> Iterator[None]:
    """Print what is logged under `laplace_dist`, one plain line each, for a while."""
    logger = logging.getLogger("laplace_dist")
    handler = _Printing()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def terminal() -> TextIO | None:
    """Return the terminal that a person looks at, where a job prints to one; in a library, a log or a pipe there is none."""
    printing = any(isinstance(handler, _Printing) for handler in logging.getLogger("laplace_dist").handlers)
    return sys.stdout if printing and sys.stdout.isatty() else None
