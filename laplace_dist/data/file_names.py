"""What the name of a file says: its kind, the split that it is of, and whether it is passed over."""

from __future__ import annotations

import re

KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".tar": "tar",
}
_PART = re.compile(r"-(?:[0-9]+|part|shard)")  # what follows the split in train-00000-of-00012.parquet


def split_of(name: str) -> str | None:
    """Return the split that a file directly under the URL is of, by its name."""
    if not kind_of(name):
        return None
    stem = name.rpartition(".")[0]
    part = _PART.search(stem)
    return stem[: part.start()] if part else stem


def kind_of(name: str) -> str | None:
    """Return the kind of a file, by the end of its name; None where that is not known."""
    return KINDS.get("." + name.rpartition(".")[2].lower()) if "." in name else None


def is_hidden(name: str) -> bool:
    """Say whether a file is passed over: it, or a folder that it lies in, begins with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in name.split("/"))
