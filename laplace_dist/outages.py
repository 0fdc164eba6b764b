"""What a file system's failures mean: whether the same request may succeed later, or somebody has to act."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import Mapping
from typing import Any

_PASSING = (asyncio.TimeoutError, TimeoutError, ConnectionError)
_PASSING_NUMBERS = (errno.EBUSY, errno.EREMOTEIO, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.EHOSTUNREACH)
# Of the 4xx, those that ask for another try; 412 is final only where the object that stood in the way can be read.
_PASSING_ANSWERS = (408, 409, 412, 425, 429)
# The remote file systems' own failures, by module. Only what is loaded can have raised one; loading takes half a second.
_REMOTE = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "botocore.parsers": ("ResponseParserError",),
}
_REMOTE_PASSING = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("HTTPClientError", "ConnectionError", "ResponseStreamingError", "IncompleteReadError"),
    "botocore.parsers": ("ResponseParserError",),
}
_NO_CREDENTIALS = {
    "botocore.exceptions": ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"),
}


def failures() -> tuple[type[Exception], ...]:
    """Return the classes of errors that a file system's operations raise."""
    return (OSError, asyncio.TimeoutError, *_loaded(_REMOTE))


def _loaded(names: Mapping[str, tuple[str, ...]]) -> list[type[Exception]]:
    """Return classes of the modules that are loaded."""
    modules = ((sys.modules[module], classes) for module, classes in names.items() if module in sys.modules)
    return [getattr(module, name) for module, classes in modules for name in classes]


def refuses(error: Exception) -> bool:
    """Say whether an error means that the credentials or the bucket are wrong, so that trying again is no use."""
    return isinstance(error, (PermissionError, *_loaded(_NO_CREDENTIALS))) or no_bucket(error)


def no_bucket(error: BaseException | None) -> bool:
    """Say whether an error, or what it came from, is an object store's answer that there is no such bucket."""
    return any(response.get("Error", {}).get("Code") == "NoSuchBucket" for response in _responses(error))


def lost_upload(error: BaseException | None) -> bool:
    """Say whether an error is the answer that an upload in parts is over, which a retry of its last step gets."""
    return any(response.get("Error", {}).get("Code") == "NoSuchUpload" for response in _responses(error))


def may_pass(error: BaseException) -> bool:
    """Say whether the same request may succeed later: no answer, a broken one, 5xx, or one that asks to wait."""
    if refuses(error):  # type: ignore[arg-type]
        return False
    for status in _statuses(error):
        return status >= 500 or status in _PASSING_ANSWERS
    return (
        isinstance(error, (*_PASSING, *_loaded(_REMOTE_PASSING))) or getattr(error, "errno", None) in _PASSING_NUMBERS
    )


def _statuses(error: BaseException) -> list[int]:
    """Return the HTTP statuses that an error carries, as botocore's, aiohttp's, Google's and Azure's do."""
    answers = [response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) for response in _responses(error)]
    own = [getattr(error, name, None) for name in ("status", "code", "status_code")]
    return answers + [number for number in own if isinstance(number, int) and 400 <= number < 600]


def _responses(error: BaseException | None) -> list[Mapping[str, Any]]:
    """Return the answers of an object store that an error, or what it came from, carries."""
    found, seen = [], 0
    while error is not None and seen < 8:
        response = getattr(error, "response", None)
        if isinstance(response, Mapping):
            found.append(response)
        handled = None if error.__suppress_context__ else error.__context__
        error, seen = error.__cause__ or handled, seen + 1
    return found
