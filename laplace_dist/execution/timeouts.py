"""How long a task may take before its worker counts as hung: what the user says, or a multiple of what others took."""

from __future__ import annotations

from dataclasses import dataclass

ENOUGH = 3  # finished tasks from which a limit is drawn
TIMES = 10  # how often the time of the slowest of them
FLOOR_SECONDS = 300.0  # and never less, so that no healthy task is given up


def measured_limit(finished: int, slowest: float) -> float | None:
    """Return the seconds after which a task of a stage counts as hung, from those of the stage that have finished.

    Args:
        finished: How many tasks have finished.
        slowest: Seconds that the slowest of them took, with the loading of the model where it was a worker's first.

    Returns:
        `max(FLOOR_SECONDS, TIMES * slowest)`, or None while fewer than `ENOUGH` have finished.
    """
    return max(FLOOR_SECONDS, TIMES * slowest) if finished >= ENOUGH else None


@dataclass
class Limit:
    """The limit of one stage; it follows the tasks that finish, unless the user gave one.

    Attributes:
        given: Seconds, from `--segment-timeout`, or None.
    """

    given: float | None = None
    _finished: int = 0
    _slowest: float = 0.0

    def finished(self, seconds: float) -> None:
        """Record the time that a task took."""
        self._finished += 1
        self._slowest = max(self._slowest, seconds)

    @property
    def seconds(self) -> float | None:
        """Seconds that a task may take; None for as long as it likes."""
        return self.given if self.given is not None else measured_limit(self._finished, self._slowest)

    def __str__(self) -> str:
        if self.given is not None:
            return f"{self.given:g} s, as --segment-timeout says"
        return (
            f"{self.seconds:.0f} s, {TIMES} times the slowest so far and at least {FLOOR_SECONDS:g} s; "
            "--segment-timeout sets another"
        )
