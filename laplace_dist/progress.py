"""What a person sees of a run: one throttled line while it works, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

NAMES = {
    "accuracy": ("accuracy", True),
    "nll": ("NLL", False),
    "brier": ("Brier", False),
    "ece": ("ECE", False),
    "rmse": ("RMSE", False),
    "coverage_90": ("coverage of 90 % intervals", None),
}


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

    def tick(self, busy: int) -> None:
        """Leave out of the rate the time in which the first workers come to life, and say when nothing finishes.

        Args:
            busy: Number of workers with a task.
        """
        now = time.monotonic()
        if not busy and self.count == self._first:
            self._begun = self._shown = self._moved = now
        elif now - self._moved >= self._quiet:
            self._quiet *= 2
            self._print(
                f"{self.count}/{self.total} {self.unit}, none finished for {clock(now - self._moved)}, {busy} at work"
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


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the table MAP | Laplace; an arrow says which direction is better.

    Args:
        metrics: For `map` and `laplace`, the numbers by name.
    """
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("metric")
    for heading in ("MAP", "Laplace"):
        table.add_column(heading, justify="right")
    for name in metrics["map"]:
        text, higher = NAMES.get(name, (name.replace("ood_auroc/", "OOD AUROC, "), True))
        arrow = {True: " ↑", False: " ↓", None: ""}[higher]
        table.add_row(text + arrow, *(f"{metrics[method][name]:.4f}" for method in ("map", "laplace")))
    return table


def show_result(result: Any, loading: str, out: TextIO | None = None) -> None:
    """Print where the checkpoint lies, how to load the posterior, and the table as the last lines.

    Args:
        result: A `driver.Result`.
        loading: Python lines that load the posterior.
        out: Where to print.
    """
    out = out or sys.stdout
    print(f"\ncheckpoint: {result.checkpoint}", file=out)
    if result.version is not None:
        print(f"posterior:  {result.version}\n\nIn Python:\n", file=out)
        print("\n".join(f"    {line}" for line in loading.splitlines()), file=out)
    if result.metrics is not None:
        print(file=out)
        Console(file=out, width=80, highlight=False, soft_wrap=True).print(metrics_table(result.metrics))
    out.flush()
