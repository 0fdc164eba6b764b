"""Durations and amounts in a few characters."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Write seconds as `hh:mm:ss`."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """Write seconds for people: `0.4 s` or `12 s` below a minute, else as `clock` does."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 60 else clock(seconds)


def size(count: float) -> str:
    """Write a number of bytes with a unit, such as `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
