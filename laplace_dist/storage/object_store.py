"""Object stores through fsspec: what they answer, what it means, and a create-only write that survives retries."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from laplace_dist.config.secrets import scrub
from laplace_dist.errors import SettingsError
from laplace_dist.outages import failures, lost_upload, no_bucket, refuses
from laplace_dist.storage.retry import Patient, patiently

__all__ = ["failures", "create", "no_bucket", "open_url", "refuses", "scrub", "swap", "swaps"]

# Of one request: three quick tries by botocore. What outlasts them is tried again by `patience`, with longer waits.
# Ten connections, botocore's default, would make 10,000 manifests wait for each other.
_S3_CLIENT = {"retries": {"mode": "standard", "total_max_attempts": 3}, "max_pool_connections": 32}

_READ_ONLY = {"http", "https"}  # whose class has a `mode` of writing and heeds it not


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
        given["config_kwargs"] = {**_S3_CLIENT, **(given.get("config_kwargs") or {})}
    try:
        fs, root = fsspec.core.url_to_fs(url, **given)
        if fs.async_impl and hasattr(fs, "connect"):
            fs.connect()  # makes the client, without a request: here a bad option or endpoint is noticed
    except (ValueError, ImportError, TypeError, *failures()) as error:
        reason = scrub(f"{type(error).__name__}: {error}", options)
        raise SettingsError(f"--checkpoint {url!r}: cannot be opened ({reason})") from None
    _check_creates(fs, url)
    if isinstance(fs, LocalFileSystem):
        _check_heeded(url, options)
        return fs, os.path.realpath(root)  # a//b, ./a and a/../b as the operating system takes them
    if hasattr(fs, "retries"):
        fs.retries = 1  # s3fs would multiply botocore's tries with its own
    return Patient(fs, lambda text: scrub(text, options)), root.rstrip("/")


def _check_heeded(url: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a local file system passes over, without their values."""
    heeded = inspect.signature(LocalFileSystem.__init__).parameters
    if idle := [str(name) for name in options if name not in heeded]:
        raise SettingsError(
            f"--storage-options: given ({', '.join(idle)}), but --checkpoint is {url!r}, a local place, which takes none of "
            "them; leave them out, or give a URL"
        )


def create(fs: Patient, path: str, data: bytes) -> bool:
    """Create an object unless it exists; whatever a request answered, what is stored decides.

    Returns:
        True if the stored bytes are these, so that a retry which meets its own write has created it.
    """

    def attempt() -> bool:
        try:
            fs.fs.pipe_file(path, data, mode="create")
            return True
        except failures() as error:  # exists; or a conflict with a write in progress; or the answer was lost
            if refuses(error) or (isinstance(error, FileNotFoundError) and not lost_upload(error)):
                raise
            failure = error
        try:
            return fs.fs.cat_file(path) == data
        except FileNotFoundError:
            raise failure from failure.__cause__  # which says whether to try again

    return patiently(attempt, f"creating {path}", fs.scrub)


def swaps(fs: Patient) -> bool:
    """Say whether a file system can replace an object on the condition that it has not changed: S3's `If-Match`."""
    return hasattr(fs.fs, "_call_s3")


def swap(fs: Patient, path: str, expected: bytes, data: bytes) -> bool:
    """Replace an object if it holds the expected bytes; whatever a request answered, what is stored decides."""

    def attempt() -> bool:
        etag = fs.fs.info(path)["ETag"]
        found = fs.fs.cat_file(path)
        if found != expected:
            return found == data
        try:
            fs.fs.pipe_file(path, data, IfMatch=etag)
            return True
        except (
            failures()
        ) as error:  # another one was first; or a conflict with a write in progress; or the answer was lost
            if refuses(error):
                raise
            failure = error
        found = fs.fs.cat_file(path)
        if found == expected:
            raise failure
        return found == data

    return patiently(attempt, f"replacing {path}", fs.scrub)


def overwrites_changed(fs: Patient, path: str) -> bool:
    """Say whether a write takes effect on the condition of an ETag that an object does not have; for a probe's object.

    Whatever the request answered, what is stored decides.
    """
    try:
        fs.fs.pipe_file(path, b"stale", IfMatch=f'"{32 * "0"}"')
    except failures() as error:
        if refuses(error):
            raise
    return fs.cat_file(path) == b"stale"


def _check_creates(fs: Any, url: str) -> None:
    """Refuse a file system that cannot create an object without overwriting one, before anything is asked of it."""
    if isinstance(fs, LocalFileSystem):
        return
    kind = type(fs)
    if not _READ_ONLY.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        raise SettingsError(
            f"--checkpoint {url!r}: a web server cannot be written to. Use a local directory, or an object store such as s3://"
        )
    method = kind._pipe_file if fs.async_impl else kind.pipe_file
    inherited = method in (fsspec.AbstractFileSystem.pipe_file, AsyncFileSystem._pipe_file)
    if inherited or "mode" not in inspect.signature(method).parameters:
        raise SettingsError(
            f"--checkpoint {url!r}: {kind.__name__} has no create-only write, so two workers could overwrite each "
            "other. Use a local directory, or an object store such as s3://"
        )
