"""One throttled line while a stage works."""

from __future__ import annotations

import sys
import time
from typing import TextIO

QUIET_SECONDS = 60.0  # without anything finished, after which that is said; then after twice as long, and so on


class Progress:
    """A line such as `map: 12/48 segments, 5120 examples/s, 00:01:10 left`, printed every few seconds and at the end.

    Args:
        stage: First word of the line.
        unit: What is counted.
        total: How many there are in all.
        done: How many were there before this process began.
        every: Seconds between lines.
        out: Where the line goes.
    """

    def __init__(
        self, stage: str, unit: str, total: int, done: int = 0, every: float = 5.0, out: TextIO | None = None
    ) -> None:
        self.stage, self.unit, self.total, self.count = stage, unit, total, done
        self._first, self._examples = done, 0
        self._every, self._out = every, out
        self._begun = self._shown = self._moved = time.monotonic()
        self._quiet = QUIET_SECONDS
        if done:
            self._print(f"{done} of {total} {unit} were committed before")

    def done(self, examples: int) -> None:
        """Count one unit of work.

        Args:
            examples: How many examples it held; 0 where that says nothing.
        """
        self.count += 1
        self._examples += examples
        now = self._moved = time.monotonic()
        self._quiet = QUIET_SECONDS
        if now - self._shown >= self._every or self.count == self.total:
            self._shown = now
            self._print(self.line(now - self._begun))

    def tick(self, busy: int, oldest: str = "") -> None:
        """Leave out of the rate the time in which the first workers come to life, and say when nothing finishes.

        Args:
            busy: Number of workers with a task.
            oldest: The task that has been at work for longest, in words.
        """
        now = time.monotonic()
        if not busy and self.count == self._first:
            self._begun = self._shown = self._moved = now
        elif now - self._moved >= self._quiet:
            self._quiet *= 2
            task = f", the first of them on {oldest}" if busy > 1 and oldest else f" on {oldest}" if oldest else ""
            self._print(
                f"{self.count}/{self.total} {self.unit}, none finished for {clock(now - self._moved)}, {busy} at work{task}"
            )

    def line(self, seconds: float) -> str:
        """Return the line's text after so many seconds."""
        parts = [f"{self.count}/{self.total} {self.unit}"]
        seconds = max(seconds, 1e-6)
        if self._examples:
            parts.append(f"{self._examples / seconds:.0f} examples/s")
        if self.count < self.total and self.count > self._first:
            left = seconds / (self.count - self._first) * (self.total - self.count)
            parts.append(f"{clock(left)} left")
        else:
            parts.append(f"{clock(seconds)}")
        return ", ".join(parts)

    def _print(self, text: str) -> None:
        print(f"{self.stage}: {text}", file=self._out or sys.stdout, flush=True)


def clock(seconds: float) -> str:
    """Write seconds as `hh:mm:ss`."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
