"""JSON objects that carry the sha256 of their own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.plan.digests import canonical
from laplace_dist.plan.plan import FORMAT_VERSION


def seal_json(values: Mapping[str, Any]) -> bytes:
    """Return readable JSON that carries the sha256 of its own content under `sha256`."""
    digest = hashlib.sha256(canonical(values)).hexdigest()
    return json.dumps({**values, "sha256": digest}, indent=1, allow_nan=False).encode()


def unseal_json(data: bytes, key: str, remedy: str) -> dict[str, Any]:
    """Read what `seal_json` returned, without the digest.

    Args:
        data: The bytes.
        key: Name of the object, for messages.
        remedy: What to do if it is bad, for messages.

    Raises:
        SettingsError: Its `format_version` is newer than this package's.
        CheckpointError: It was truncated or altered; the message names `key`.
    """
    try:
        values = json.loads(data)
        digest = values.pop("sha256")
        content = hashlib.sha256(canonical(values)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{key} is truncated or altered: it is not a sealed JSON object. {remedy}") from error
    version = values.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise SettingsError(
            f"{key} has format_version {version}; this version of laplace_dist reads up to {FORMAT_VERSION}. "
            "Install the newer version that wrote it, or give another --checkpoint."
        )
    if digest != content:
        raise CheckpointError(f"{key} is truncated or altered: its content does not have the sha256 in it. {remedy}")
    return values
