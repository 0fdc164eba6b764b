"""Keeping the values of storage options out of every text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


def scrub(text: str, options: Mapping[str, Any]) -> str:
    """Remove the values of storage options from a message."""
    for value in leaves(options):
        text = text.replace(value, "***")
    return text


def leaves(value: Any) -> Iterator[str]:
    """Yield every string of four or more characters in nested options, the longest first."""
    if isinstance(value, Mapping):
        found = [leaf for item in value.values() for leaf in leaves(item)]
    elif isinstance(value, list | tuple):
        found = [leaf for item in value for leaf in leaves(item)]
    else:
        found = [part for part in _parts(value) if len(part) >= 4] if isinstance(value, str) else []
    yield from sorted(found, key=len, reverse=True)


def _parts(value: str) -> list[str]:
    """Return a string, and of a URL also the user's name and password in it."""
    inside = re.match(r"[^/]*://([^/@]*)@", value)
    return [value, *(inside[1].split(":", 1) if inside else [])]
