"""What a store says when something fails: which object, why, and what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from laplace_dist import outages
from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError, StorageError
from laplace_dist.storage import local, object_store

_RERUN = "Run the same command again: it continues from what is committed."


class Messages:
    """The part of a store that says what went wrong; `url`, `is_local` and `_options` come from the store itself."""

    def remedy(self, key: str) -> str:
        """Say what to do about a bad object; whoever knows what lies under the keys overrides this."""
        return "Restore it from a copy."

    @contextmanager
    def _reporting(self, key: str, verb: str) -> Iterator[None]:
        """Turn the file system's errors into ones that name the object and the remedy."""
        try:
            yield
        except outages.failures() as error:
            raise self._explain(error, key, verb) from (error if self.is_local else None)

    def _explain(self, error: Exception, key: str, verb: str) -> Exception:
        reason = self._scrub(f"{type(error).__name__}: {error}")
        number = getattr(error, "errno", None)
        if isinstance(error, local.NoHardLinks):
            return SettingsError(
                f"--checkpoint {self.url!r}: the file system there has no hard links, which commits need: use another "
                f"directory or an object store ({reason})"
            )
        if number == errno.ENAMETOOLONG:
            return SettingsError(
                f"--checkpoint {self.url!r}: a name there is too long for the file system ({reason}). Give a shorter one."
            )
        if verb == "write":
            if number in (errno.ENOSPC, errno.EDQUOT):
                return RunFailed(
                    f"{self._where(key)}: no space left on the device while writing it; nothing of it is committed. "
                    f"Free some space. {_RERUN}"
                )
            refused = PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError
            if isinstance(error, refused) or number in (errno.EROFS, errno.EPERM, errno.ENOTSUP):
                return SettingsError(
                    f"--checkpoint {self.url!r}: cannot write {key!r} there ({reason}). "
                    "Give a directory, or a URL with its --storage-options, that this process may write to."
                )
        if outages.refuses(error):
            return SettingsError(
                f"--checkpoint {self.url!r}: may not {verb} {key!r} there ({reason}). Check that the bucket or directory "
                "exists and that --storage-options hold credentials that may read, write and list it."
            )
        if verb != "write" and isinstance(error, FileNotFoundError | NotADirectoryError):
            return self._missing(key)
        return StorageError(f"{self._where(key)}: could not {verb} it ({reason}). Check the storage. {_RERUN}")

    def _missing(self, key: str) -> MissingObjectError:
        return MissingObjectError(f"{self._where(key)} is missing. {self.remedy(key)}")

    def _altered(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._where(key)} is truncated or altered: {why}. {self.remedy(key)}")

    def _where(self, key: str) -> str:
        return f"{self.url.rstrip('/')}/{key}"

    def _scrub(self, text: str) -> str:
        return object_store.scrub(text, self._options)
