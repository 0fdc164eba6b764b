"""Trying a remote storage's operations again while their failures may pass: outages, throttling, lost answers."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from laplace_dist.outages import failures, may_pass, no_bucket

# Seconds for which a storage that does not answer, or answers with a failure, is tried again: a server that restarts or fails
# over, and a client that is throttled, are back within a minute or so. What takes longer needs a person, who should hear of it.
PATIENCE = 120.0
# Seconds between two tries, at most: what is lost after the storage is back. A hundred workers that wait ask it some tens of
# times a second then, which brings down no server that is coming back.
SLOWEST = 5.0

_PATTERN = re.compile(r"[*?\[]")  # what fsspec's bulk operations expand instead of taking it as it is
_AT_ONCE = 16  # single deletions

_log = logging.getLogger(__name__)
_told = float("-inf")  # when a warning was last logged


def patiently(call: Callable[[], Any], what: str = "", scrub: Callable[[str], str] = str) -> Any:
    """Return what a call returns, trying it again for `PATIENCE` seconds while its failure may pass.

    The waits grow exponentially up to `SLOWEST` and are drawn at random, so that workers do not come back together.
    Trouble that lasts for longer than `SLOWEST` is logged as a warning, by one thread of many, once in so many seconds.

    Args:
        call: Safe to repeat.
        what: What is being tried, for the log.
        scrub: Removes secrets from the log.

    Raises:
        Exception: The last failure, as the call raised it.
    """

    def tell(state: RetryCallState) -> None:
        global _told
        now = time.monotonic()
        if state.seconds_since_start >= SLOWEST and now - _told >= SLOWEST:
            _told = now
            error = state.outcome.exception()
            text = scrub(f"{what}: {type(error).__name__}: {error}")
            _log.warning("the storage has been failing for %.0f s; trying again. %s", state.seconds_since_start, text)

    tries = Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_random_exponential(multiplier=0.2, max=SLOWEST),
        stop=stop_after_delay(PATIENCE),
        before_sleep=tell,
        reraise=True,
    )
    return tries(call)


class Patient:
    """The operations of a remote file system that a store uses, each tried again while its failure may pass.

    All of them have the same effect once or many times, so that an answer may be lost. Creating without overwriting is
    not among them: see `remote.create`.

    Args:
        fs: An fsspec file system.
        scrub: Removes secrets from the log.
    """

    def __init__(self, fs: Any, scrub: Callable[[str], str]) -> None:
        self.fs, self.scrub = fs, scrub

    def _try(self, call: Callable[[], Any], what: str) -> Any:
        try:
            return patiently(call, what, self.scrub)
        except FileNotFoundError as error:
            if no_bucket(error):  # not a missing object, which may be as it should be
                raise PermissionError("there is no such bucket") from error
            raise

    def cat_file(self, path: str) -> bytes:
        """Return an object's bytes."""
        return self._try(lambda: self.fs.cat_file(path), f"reading {path}")

    def cat(self, paths: list[str]) -> dict[str, Any]:
        """Return the bytes of objects, or the exception, by path; only those that failed are asked for again.

        By `cat_ranges`, whole: fsspec's own `cat` takes paths with `*?[` for patterns.
        """
        found: dict[str, Any] = {}

        def missing() -> None:
            left = [path for path in paths if path not in found or _failed(found[path])]
            found.update(zip(left, self.fs.cat_ranges(left, None, None, on_error="return"), strict=True))
            for path in left:
                if _failed(found[path]):
                    raise found[path]

        try:
            self._try(missing, f"reading {len(paths)} objects")
        except failures():
            if not found:
                raise
        return found

    def pipe_file(self, path: str, data: bytes) -> None:
        """Write an object, over an old one if there is one."""
        self._try(lambda: self.fs.pipe_file(path, data), f"writing {path}")

    def info(self, path: str) -> dict[str, Any]:
        """Return what is known of an object."""
        return self._try(lambda: self.fs.info(path), f"finding {path}")

    def find(self, path: str, **options: Any) -> Any:
        """Return all objects under a path."""
        return self._try(lambda: self.fs.find(path, **options), f"listing {path}")

    def ls(self, path: str, **options: Any) -> Any:
        """Return what lies directly in a path."""
        return self._try(lambda: self.fs.ls(path, **options), f"listing {path}")

    def rm(self, path: str) -> None:
        """Delete the object with a path and what is under it.

        Looks that all is gone, since deleting many at once reports no failures, and since an object that has the name of
        a folder is found only when the folder is empty.
        """

        def gone() -> None:
            for _ in range(2):
                if found := self._objects(path):
                    self._rm_all(found)
            if left := self._objects(path):
                raise OSError(errno.EBUSY, f"{len(left)} objects are still there after they were deleted")

        self._try(gone, f"deleting {path}")

    def _objects(self, path: str) -> list[str]:
        """Return the object with a path, or else those under it; without the folders that some stores list as well."""
        return [name for name, info in self.fs.find(path, detail=True).items() if info["type"] == "file"]

    def _rm_all(self, paths: list[str]) -> None:
        """Delete objects, many with one request but for those whose paths fsspec would take for patterns."""
        odd = [path for path in paths if _PATTERN.search(path)]
        if plain := [path for path in paths if not _PATTERN.search(path)]:
            with suppress(FileNotFoundError):  # another process was faster; whether anything is left is looked at
                self.fs.rm(plain)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self._rm_one, odd))

    def _rm_one(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(path)


def _failed(value: Any) -> bool:
    return isinstance(value, Exception) and may_pass(value)
