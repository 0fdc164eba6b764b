"""What the loop, its workers and the stages have in common: tasks, what becomes of them, and who carries them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from laplace_dist.execution.kernel_kills import kernel_kills
from laplace_dist.execution.raised import Raised
from laplace_dist.execution.timeouts import Limit


class Task(Protocol):
    """One unit of work, small and plain; its effect lies in the store, so that doing it twice changes nothing.

    The stages define them, as frozen dataclasses. What `run` returns is a receipt: a small mapping; `examples` in it counts
    towards the rate that is shown. Or it returns the call that commits what was computed and returns the receipt: a worker may
    make it while it is at the next task.
    """

    @property
    def what(self) -> str:
        """The task in a person's words, such as `segment 000003 (examples 768 to 1023)`; no two of a stage are equal."""

    def run(self, context: Any) -> Mapping[str, Any] | Callable[[], Mapping[str, Any]]:
        """Do the work and commit it, or return the call that does.

        Args:
            context: What a task may use; see `stages.context.Context`.
        """


@dataclass(frozen=True)
class Answer:
    """What a worker returns of a call.

    Attributes:
        outcome: The task's receipt, or what it raised; None if its commit goes on, which the answer to the next call tells of.
        before: Of the task before, whose commit went on meanwhile: its receipt, or what it raised. None if there was none.
        kills: How many processes the kernel of the worker's machine had ended for memory by then; None where it does not say.
    """

    outcome: Mapping[str, Any] | Raised | None
    before: Mapping[str, Any] | Raised | None = None
    kills: int | None = field(default_factory=kernel_kills)


@dataclass(frozen=True)
class Event:
    """What became of a task: one of receipt, failure, refusal is set.

    Attributes:
        task: The task; None for a refusal that concerns all of them, such as that no worker can start.
        receipt: What the task returned.
        failure: Why it should be tried again, elsewhere.
        refusal: An error that would come again wherever it ran.
        seconds: How long the task took.
        lost: The failure is the loss of the node, which says nothing of the task; False if the node lives on.
        raised: What the task raised, where the failure is that.
        memory: The worker was ended for its node's memory, by Ray or by the kernel.
        node: Where it failed; empty where there is no other node on which it could be tried.
    """

    task: Task | None
    receipt: Mapping[str, Any] | None = None
    failure: str | None = None
    refusal: Exception | None = None
    seconds: float = 0.0
    lost: bool = False
    raised: Raised | None = None
    memory: bool = False
    node: str = ""


class Workers(Protocol):
    """What the loop needs of a pool of workers.

    Attributes:
        size: How many workers there would be with enough to do; it may change at any time.
        idle: How many wait for a task.
        busy: How many tasks are in flight.
        alive: How many workers have come to life and not been lost.
    """

    size: int
    idle: int
    busy: int
    alive: int

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most `size`."""

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker."""

    def wait(self, seconds: float, limit: Limit) -> list[Event]:
        """Return what happened within so many seconds; a task in flight for longer than the limit has failed."""

    def close(self) -> None:
        """End every worker."""


class Executor(Protocol):
    """Where a job's tasks are carried out: `ray_cluster.Cluster`, or `inline.Inline` without Ray."""

    def device_type(self) -> str:
        """Return `cuda` or `cpu`, the type of device that the workers use."""

    def memory(self, device: str) -> int | None:
        """Return the bytes that a worker can have at most, as far as is known before any is started; None where nothing is.

        Args:
            device: `cpu` or `cuda`, where it computes.
        """

    def admit(self, device: str) -> None:
        """Refuse workers that can never be had, before anything is begun; arguments as of `memory`.

        Raises:
            SettingsError: Naming the setting that asks for more than there is.
        """

    def pool(self, device: str, expected: int | None = None) -> Workers:
        """Return the workers.

        Args:
            device: `cpu` or `cuda`: those that compute there, and no others.
            expected: Bytes that a worker is expected to take at its peak, where that is known: what no machine is to be given
                more workers than it holds.
        """

    def close(self) -> None:
        """Give back whatever was taken."""
