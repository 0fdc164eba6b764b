"""Names that are safe as URLs, as keys and as names of arrays."""

from __future__ import annotations

import re
from collections.abc import Collection

from laplace_dist.errors import CheckpointError, SettingsError

_VERSION = "?versionId="  # s3fs takes what follows for the version of another object


def check_url(url: str) -> str:
    """Return the URL if it names one place, and no secret.

    To an object store `a//b`, `a/./b` and `a/b` are three places, but many a client, console or proxy makes one of them.
    Which one is meant cannot be known, so only the last is accepted; slashes at the end change nothing. A local path means
    what the operating system takes it for.

    Raises:
        SettingsError: It holds credentials, or an empty part, `.` or `..`; or it is a chain.
    """
    if re.search(r"://[^/@]*@", url):
        raise SettingsError("--checkpoint: credentials in a URL would be shown and stored; give storage options")
    if "::" in url and "://" in url:
        raise SettingsError(
            f"--checkpoint: got {url!r}, a chain of file systems; caches and archives do not keep what commits need: "
            "create-only writes that all see. Give the URL at its end alone"
        )
    protocol, separator, path = url.partition("://")
    if not separator or protocol in ("file", "local"):
        return url
    if any(part in ("", ".", "..") for part in path.rstrip("/").split("/")) or _VERSION in path:
        raise SettingsError(
            f"--checkpoint: got {url!r}; expected parts joined by single slashes, without '.', '..' or {_VERSION!r}: object "
            "stores and their tools disagree on the place that such a URL names"
        )
    return url


def check_key(key: str) -> str:
    """Return the key if it is a plain relative path that cannot leave the checkpoint.

    Raises:
        CheckpointError: For an absolute path, an empty part, `.`, `..`, a backslash, a control character or `?versionId=`.
    """
    bad = any(part in ("", ".", "..") for part in key.split("/")) or _VERSION in key
    if bad or "\\" in key or not key.isprintable():
        raise CheckpointError(
            f"{key!r} is not a key inside the checkpoint: expected parts joined by single slashes, without '..', "
            "backslashes or control characters. If it comes from a manifest, that manifest was altered; delete it."
        )
    return key


def check_names(names: Collection[str]) -> None:
    """Check that factor names can all be arrays of one Zarr group.

    Raises:
        CheckpointError: For a name that is no safe path, is reserved by Zarr, or lies inside another one.
    """
    for name in names:
        for part in check_key(name).split("/"):
            if part.startswith("__") or part == "zarr.json" or not part.strip(".") or len(part.encode()) > 255:
                raise CheckpointError(f"factor name {name!r}: Zarr reserves the part {part!r}; rename the parameter")
    for first, second in zip(ordered := sorted(n + "/" for n in names), ordered[1:], strict=False):
        if second.startswith(first):
            raise CheckpointError(f"factor name {second[:-1]!r} lies inside the array {first[:-1]!r}; rename one")
