"""The live display of a stage in a terminal: a bar, the rate, what is left, the workers, and what was done again."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from laplace_dist.report.rate import clock


class Live:
    """A bar that is gone when it is closed; lines that are printed meanwhile scroll by above it.

    Args:
        stage: First word.
        unit: What is counted.
        total: How many there are in all.
        terminal: Where it is shown.
    """

    def __init__(self, stage: str, unit: str, total: int, terminal: TextIO) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
        )
        self._unit, self._total = unit, total
        self._display = Progress(*columns, console=Console(file=terminal), transient=True, refresh_per_second=4)
        self._task = self._display.add_task(stage, total=total, state="")
        self._display.start()

    def show(self, count: int, rate: float, left: float | None, alive: int, retries: int, lost: int) -> None:
        """Show how far the stage is.

        Args:
            count: Units done.
            rate: Examples per second; 0 if that says nothing.
            left: Seconds that it will take, or None if nothing can be said.
            alive: Workers.
            retries: Tasks done again.
            lost: Tasks lost with their nodes.
        """
        parts = [f"{count}/{self._total} {self._unit}"]
        parts += [f"{rate:.0f} examples/s"] if rate else []
        parts += [f"{clock(left)} left"] if left is not None else []
        parts.append(f"{alive} worker{'' if alive == 1 else 's'}")
        parts += [f"{retries} retried"] if retries else []
        parts += [f"{lost} lost"] if lost else []
        self._display.update(self._task, completed=count, state=" · ".join(parts))

    def close(self) -> None:
        """Take it away, and give the terminal back."""
        self._display.stop()
