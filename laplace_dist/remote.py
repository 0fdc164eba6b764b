"""Object stores through fsspec: what they answer, what it means, and a create-only write that survives retries."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from laplace_dist.errors import SettingsError

FAILURES: tuple[type[Exception], ...] = (OSError, asyncio.TimeoutError)
_NO_CREDENTIALS: tuple[type[Exception], ...] = ()
try:  # the remote file systems' own failures, where they are installed
    from botocore import exceptions as boto

    FAILURES = (*FAILURES, boto.BotoCoreError, boto.ClientError)
    _NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError)
except ImportError:
    pass


def open_url(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the file system and the root path of a URL, with nothing cached that another process may change.

    Raises:
        SettingsError: The protocol, an option or the endpoint is not usable, or the file system cannot create an
            object without overwriting one. The message holds no option's value.
    """
    given = dict(options)
    if "://" in url and not url.startswith(("file:", "local:")):
        given.setdefault("use_listings_cache", False)
    if url.startswith(("s3:", "s3a:")):
        given.setdefault("max_concurrency", 1)  # one GET per object instead of HEAD and GET: chunks are small enough
    try:
        fs, root = fsspec.core.url_to_fs(url, **given)
        if fs.async_impl and hasattr(fs, "connect"):
            fs.connect()  # makes the client, without a request: here a bad option or endpoint is noticed
    except (ValueError, ImportError, TypeError, *FAILURES) as error:
        reason = scrub(f"{type(error).__name__}: {error}", options)
        raise SettingsError(f"--checkpoint {url!r}: cannot be opened ({reason})") from None
    _check_creates(fs, url)
    return fs, root.rstrip("/")


def create(fs: Any, path: str, data: bytes, tries: int = 5) -> bool:
    """Create an object unless it exists; whatever a request answered, what is stored decides.

    Returns:
        True if the stored bytes are these, so that a retry which meets its own write has created it.
    """
    for attempt in range(tries):
        try:
            fs.pipe_file(path, data, mode="create")
            return True
        except FAILURES as error:  # exists; or a conflict with a write in progress; or the answer was lost
            if isinstance(error, FileNotFoundError) or refuses(error):
                raise
            failure = error
        try:
            return fs.cat_file(path) == data
        except FileNotFoundError:
            time.sleep(0.1 * 2**attempt)
    raise failure


def refuses(error: Exception) -> bool:
    """Say whether an error means that the credentials or the bucket are wrong, so that trying again is no use."""
    return isinstance(error, (PermissionError, *_NO_CREDENTIALS)) or no_bucket(error)


def no_bucket(error: BaseException | None) -> bool:
    """Say whether an error, or what it came from, is an object store's answer that there is no such bucket."""
    seen = 0
    while error is not None and seen < 8:
        response = getattr(error, "response", None)
        if isinstance(response, Mapping) and response.get("Error", {}).get("Code") == "NoSuchBucket":
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def scrub(text: str, options: Mapping[str, Any]) -> str:
    """Remove the values of storage options from a message."""
    for value in _leaves(options):
        text = text.replace(value, "***")
    return text


def _leaves(value: Any) -> Iterator[str]:
    """Yield every string of four or more characters in nested options, the longest first."""
    if isinstance(value, Mapping):
        found = [leaf for item in value.values() for leaf in _leaves(item)]
    elif isinstance(value, list | tuple):
        found = [leaf for item in value for leaf in _leaves(item)]
    else:
        found = [value] if isinstance(value, str) and len(value) >= 4 else []
    yield from sorted(found, key=len, reverse=True)


def _check_creates(fs: Any, url: str) -> None:
    """Refuse a file system that cannot create an object without overwriting one."""
    if isinstance(fs, LocalFileSystem):
        return
    kind = type(fs)
    method = kind._pipe_file if fs.async_impl else kind.pipe_file
    inherited = method is getattr(fsspec.AbstractFileSystem, "pipe_file", None)
    if inherited or "mode" not in inspect.signature(method).parameters:
        raise SettingsError(
            f"--checkpoint {url!r}: {kind.__name__} has no create-only write, so two workers could overwrite each "
            "other. Use a local directory, or an object store such as s3://"
        )
