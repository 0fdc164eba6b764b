"""How long anything may take: a task before its worker counts as hung, a cluster to start, the end of an interrupted job."""

from __future__ import annotations

from dataclasses import dataclass

# Finished tasks from which a limit is drawn: one may have been short by chance, and waiting for more leaves a hang unnoticed.
ENOUGH = 3
# How often the time of the slowest of them. Tasks of a stage are of one size, so what differs is the node and its load; a
# limit that is too low does the work of a slow node again and again, one that is too high costs a worker for that long.
TIMES = 10
# And never less: a store that is out for two minutes (`storage.retry`) and a first batch that compiles kernels are no hang.
FLOOR_SECONDS = 300.0

# A private cluster starts in 3 to 10 s, on a busy machine in up to a minute. What takes longer has been seen to take for ever.
START_SECONDS = 90.0

# Tasks in flight when a signal comes: Kubernetes and most spot machines leave 30 s between the notice and the end, in
# which the workers and the cluster have to be ended too.
GRACE_SECONDS = 15.0
# From the signal until the process leaves, whatever hangs then.
LEAVE_SECONDS = 25.0


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
