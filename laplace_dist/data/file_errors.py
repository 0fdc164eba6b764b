"""What is said of a file that cannot be read: its name, the reason, no secret, and whether another attempt may succeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from laplace_dist.config.secrets import scrub
from laplace_dist.outages import may_pass

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class FileError(OSError):
    """A file cannot be read, is cut off, or is not the one that it was; the message names it.

    Attributes:
        passing: Whether another attempt may succeed: the file system failed, and did not say that there is no such file.
    """

    passing = False


@contextmanager
def naming(name: str, options: Mapping[str, Any], what: str = "cannot be read") -> Iterator[None]:
    """Turn any error of a file system into a `FileError` that names the file and no option.

    Args:
        name: Of the file.
        options: Of its storage, whose values are kept out of the message.
        what: What is wrong with it.
    """
    try:
        yield
    except Exception as error:  # every file system has errors of its own
        found = FileError(scrub(f"{name} {what} ({type(error).__name__}: {error})", options))
        found.passing = not isinstance(error, _LASTING)
        raise found from None


@contextmanager
def outages_alone(url: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Let a failure through that may pass, as a `FileError`; any other means that one cannot look here, and is dropped.

    Whoever then opens something at the URL by name says what is wrong with it.
    """
    try:
        yield
    except Exception as error:  # every file system has errors of its own
        if may_pass(error):
            with naming(url, options, "cannot be listed"):
                raise
