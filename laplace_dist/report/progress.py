"""How a stage goes, for whoever watches: a live display in a terminal, one throttled line elsewhere."""

from __future__ import annotations

import logging
import time

from laplace_dist.report.console import terminal
from laplace_dist.report.live import Live
from laplace_dist.report.rate import clock

EVERY = 10.0  # seconds between two lines
QUIET_SECONDS = 60.0  # without anything finished, after which that is said; then after twice as long, and so on
log = logging.getLogger("laplace_dist")


class Progress:
    """A line such as `map: 12/48 segments, 5120 examples/s, 00:01:10 left`, said every few seconds and at the end.

    Lines go to the logger `laplace_dist`, as everything that a job says. In a terminal a bar takes the place of those
    between, and the last one stays.

    Args:
        stage: First word of the line.
        unit: What is counted.
        total: How many there are in all.
        done: How many were there before this process began.
        every: Seconds between lines.
    """

    def __init__(self, stage: str, unit: str, total: int, done: int = 0, every: float = EVERY) -> None:
        self.stage, self.unit, self.total, self.count = stage, unit, total, done
        self._first, self._examples, self._retries, self._lost = done, 0, 0, 0
        self._every = every
        self._begun = self._shown = self._moved = time.monotonic()
        self._quiet = QUIET_SECONDS
        self._live: Live | None = None
        if done:
            self._print(f"{done} of {total} {unit} were committed before")

    def done(self, examples: int, stored: int = 0) -> None:
        """Count one unit of work.

        Args:
            examples: How many examples it held; 0 where that says nothing.
            stored: Bytes that it stored.
        """
        self.count += 1
        self._examples += examples
        now = self._moved = time.monotonic()
        self._quiet = QUIET_SECONDS
        due = self.count == self.total or (now - self._shown >= self._every and self._live is None)
        if due:
            self._shown = now
            self._end_live()
            self._print(self.line(now - self._begun))

    def failed(self, lost: bool) -> None:
        """Count a failure: the loss of a node, or one after which a task is done again."""
        self._lost, self._retries = self._lost + lost, self._retries + (not lost)

    def tick(self, busy: int, oldest: str = "", alive: int = 0) -> None:
        """Leave out of the rate the time in which the first workers come to life, and say when nothing finishes.

        Args:
            busy: Number of workers with a task.
            oldest: The task that has been at work for longest, in words.
            alive: Number of workers.
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
        self._show(now - self._begun, alive)

    def close(self) -> None:
        """End the live display."""
        self._end_live()

    def line(self, seconds: float) -> str:
        """Return the line's text after so many seconds."""
        parts = [f"{self.count}/{self.total} {self.unit}"]
        seconds = max(seconds, 1e-6)
        if self._examples:
            parts.append(f"{self._examples / seconds:.0f} examples/s")
        if self.count < self.total and self.count > self._first:
            parts.append(f"{clock(self._left(seconds))} left")
        else:
            parts.append(f"{clock(seconds)}")
        parts += [f"{self._retries} retried"] if self._retries else []
        parts += [f"{self._lost} lost with their nodes"] if self._lost else []
        return ", ".join(parts)

    def _left(self, seconds: float) -> float:
        return seconds / (self.count - self._first) * (self.total - self.count)

    def _show(self, seconds: float, alive: int) -> None:
        """Show the live display, in a terminal, while there is something left to do."""
        if self.count >= self.total:
            return
        if self._live is None:
            if (there := terminal()) is None:
                return
            self._live = Live(self.stage, self.unit, self.total, there)
        rate = self._examples / max(seconds, 1e-6)
        left = self._left(seconds) if self.count > self._first else None
        self._live.show(self.count, rate, left, alive, self._retries, self._lost)

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None

    def _print(self, text: str) -> None:
        log.info("%s: %s", self.stage, text)
