"""What a job's stages share while they carry out tasks: one executor, one pool of workers, one sign of life."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from laplace_dist.config.settings import Config
from laplace_dist.errors import StorageError
from laplace_dist.execution.inline import Inline
from laplace_dist.execution.loop import run_tasks
from laplace_dist.execution.ray_cluster import Cluster
from laplace_dist.execution.tasks import Event, Executor, Task, Workers
from laplace_dist.execution.timeouts import Limit
from laplace_dist.run.journal import Journal
from laplace_dist.run.leases import Lease
from laplace_dist.storage.store import Store

ExecutorType = Callable[[Config, Callable[[str], None]], Executor]


class Listener(Protocol):
    """What hears how a stage goes; see `report.progress.Progress` and `run.journal.StageRecord`."""

    def done(self, examples: int, stored: int = 0) -> None:
        """Count one task, with the examples that it held and the bytes that it stored."""

    def failed(self, lost: bool) -> None:
        """Count a failure: the loss of a node, or one that says something of the task."""

    def tick(self, busy: int, oldest: str, alive: int) -> None:
        """Hear about once a second how many tasks are in flight, the oldest of them in words, and how many workers live."""

    def close(self) -> None:
        """Hear that the stage has ended, in whatever way."""


class Shown(Listener, Protocol):
    """What tells people how a stage goes; see `report.progress.Progress`."""

    stage: str
    unit: str
    total: int
    count: int


@dataclass
class Stage:
    """A stage that has begun.

    Attributes:
        pool: The workers.
        listeners: Who hears how it goes.
        limit: How long one task may take.
        alike: As of `Session.run`.
        alive: Called about once a second.
        say: Where lines for people go.
    """

    pool: Workers
    listeners: list[Listener]
    limit: Limit
    alike: bool
    alive: Callable[[], None]
    say: Callable[[str], None]

    def carry_out(
        self,
        tasks: Iterable[Task],
        *,
        each: Callable[[Mapping[str, Any]], None] = lambda receipt: None,
        keep: bool = True,
    ) -> list[Mapping[str, Any]]:
        """Carry out some tasks and return their receipts, in the order in which they finish.

        Args:
            tasks: The tasks.
            each: Called with every receipt.
            keep: Return the receipts; none otherwise.
        """
        kept: list[Mapping[str, Any]] = []

        def on_done(_: Task, receipt: Mapping[str, Any]) -> None:
            each(receipt)
            if keep:
                kept.append(receipt)

        how = {"limit": self.limit, "tick": self._tick, "on_failure": self._failed, "alike": self.alike}
        run_tasks(self.pool, tasks, on_done, say=self.say, **how)
        return kept

    def done(self, receipt: Mapping[str, Any]) -> None:
        """Count one unit of the stage, with the examples and bytes that a receipt tells of."""
        for listener in self.listeners:
            listener.done(receipt.get("examples", 0), receipt.get("bytes", 0))

    def _failed(self, event: Event) -> None:
        for listener in self.listeners:
            listener.failed(event.lost)

    def _tick(self, busy: int, oldest: str) -> None:
        for listener in self.listeners:
            listener.tick(busy, oldest, self.pool.alive)
        self.alive()


class Session:
    """Carries out tasks; Ray is joined, and workers are started, with the first one.

    Args:
        config: The job's settings.
        store: The checkpoint.
        executor: Where the tasks are carried out, such as `Inline`; what `--ray-address` says if not given.
        say: Where lines for people go.
        commits: The tasks write to the checkpoint, where a sign says so meanwhile that a job is at work.
        journal: The record of the job, which hears of every stage.

    Attributes:
        expected: Bytes that a worker is expected to take, where that is known before the first is started.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        executor: ExecutorType | None,
        say: Callable[[str], None],
        *,
        commits: bool = True,
        journal: Journal | None = None,
    ) -> None:
        inline = config.ray_address == "inline"
        self.executor: Executor = (executor or (Inline if inline else Cluster))(config, say)
        self.pool: Workers | None = None
        self.expected: int | None = None
        self._config, self._say, self._journal = config, say, journal
        self.lease = Lease(store) if commits else None

    def run(
        self,
        tasks: Iterable[Task],
        device: str,
        progress: Shown,
        *,
        keep: bool = False,
        alike: bool = True,
        run: str | None = None,
    ) -> list[Mapping[str, Any]]:
        """Carry out the tasks of a stage.

        Args:
            tasks: Of the stage.
            device: Where the workers compute: `cpu` or `cuda`.
            progress: Of the stage.
            keep: Return the receipts.
            alike: The tasks are of about one size, so that the time of those that finish says when one hangs; where they
                are not, only a limit that the user gave holds.
            run: Digest of the run's plan, which the record of the job is kept under; that of the first task if not given.
        """
        tasks = iter(tasks)
        first = next(tasks, None)
        if first is None:
            return []
        with self.stage(device, progress, run or first.plan, alike=alike) as stage:
            return stage.carry_out(chain([first], tasks), each=stage.done, keep=keep)

    @contextmanager
    def stage(self, device: str, progress: Shown, run: str, *, alike: bool = True) -> Iterator[Stage]:
        """Begin a stage, whose tasks are carried out in rounds that wait for each other; arguments as of `run`."""
        self.pool = self.pool or self.executor.pool(device, self.expected)
        self._show_lease()
        listeners: list[Listener] = [progress]
        if self._journal is not None:
            shown = progress.stage, progress.unit, progress.total, progress.count
            listeners.append(self._journal.stage(run, *shown))
        given = self._config.segment_timeout
        limit = Limit(given if alike or given is not None else float("inf"))
        say = self._say
        try:
            yield Stage(
                self.pool, listeners, limit, alike, self._show_lease, lambda text: say(f"{progress.stage}: {text}")
            )
        finally:
            for listener in listeners:
                listener.close()

    def end_workers(self) -> None:
        """End the workers of a run that is deleted, the sign of life with it; the next stage starts others."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None
        if self.lease is not None:
            self.lease.forget()

    def close(self) -> None:
        """End the workers and leave the cluster."""
        try:
            if self.pool is not None:
                self.pool.close()
            self._end_lease()
        finally:
            self.executor.close()

    def _show_lease(self) -> None:
        if self.lease is not None:
            self.lease.show()

    def _end_lease(self) -> None:
        try:
            if self.lease is not None:
                self.lease.end()
        except StorageError as error:  # which is no reason to lose the job's own error, or its success
            self._say(f"the sign that this job is at work stays behind, and counts for another hour ({error})")
