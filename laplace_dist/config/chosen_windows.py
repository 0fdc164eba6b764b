"""What windows may be called, and how some of them are chosen by a rule or by their names."""

from __future__ import annotations

import re

LAST = re.compile(r"last:([1-9][0-9]*)")
LONGEST = 128  # bytes of a name: half of what that of a file or folder may have, as others are made of it
_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*")


def is_short(name: str) -> bool:
    """Say whether a name can be part of a file's."""
    return len(name.encode(errors="surrogateescape")) <= LONGEST


def checked_name(value: str) -> str:
    """Return the name of a window if it can be one.

    Raises:
        ValueError: Saying what a name may be.
    """
    if not _NAME.fullmatch(value) or not is_short(value) or value == "all" or value.startswith("without-"):
        raise ValueError(
            f"a name of letters, digits, '_', '-' and '.', at most {LONGEST} bytes, such as 2026-03-01, that is not all, which "
            "--windows takes for every window, and does not begin with without-, as the decision of a --drop-window does"
        )
    return value


def checked(value: str) -> str:
    """Return the text that chooses windows if it can choose some; which there are it does not know.

    Raises:
        ValueError: Saying what is accepted.
    """
    names = value.split(",")
    if value == "all" or LAST.fullmatch(value):
        return value
    if len(set(names)) < len(names) or any(not re.fullmatch(r"[\w-][\w.-]*", name) or name == "all" for name in names):
        raise ValueError("all, last:K with K of at least 1, or distinct names with commas between them")
    return value
