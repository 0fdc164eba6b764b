"""Ids of attempts: what each one writes lies under a prefix of its own."""

from __future__ import annotations

import uuid


def new_attempt() -> str:
    """Return an id that no other attempt has."""
    return uuid.uuid4().hex
