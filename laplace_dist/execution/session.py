"""What a job's stages share while they carry out tasks: one executor, one pool of workers, one sign of life."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


class Session:
    """Carries out tasks; Ray is joined, and workers are started, with the first one.

    Args:
        config: The job's settings.
        store: The checkpoint.
        executor: Where the tasks are carried out, such as `Inline`; what `--ray-address` says if not given.
        say: Where lines for people go.
        commits: The tasks write to the checkpoint, where a sign says so meanwhile that a job is at work.
        journal: The record of the job, which hears of every stage.
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
        kept: list[Mapping[str, Any]] = []
        tasks = iter(tasks)
        first = next(tasks, None)
        if first is None:
            return kept
        self.pool = self.pool or self.executor.pool(device)
        self._show_lease()

        listeners: list[Listener] = [progress]
        if self._journal is not None:
            stage = progress.stage, progress.unit, progress.total, progress.count
            listeners.append(self._journal.stage(run or first.plan, *stage))

        def on_done(_: Task, receipt: Mapping[str, Any]) -> None:
            for listener in listeners:
                listener.done(receipt.get("examples", 0), receipt.get("bytes", 0))
            if keep:
                kept.append(receipt)

        def on_failure(event: Event) -> None:
            for listener in listeners:
                listener.failed(event.lost)

        def tick(busy: int, oldest: str) -> None:
            for listener in listeners:
                listener.tick(busy, oldest, self.pool.alive)
            self._show_lease()

        given = self._config.segment_timeout
        limit = Limit(given if alike or given is not None else float("inf"))
        try:
            run_tasks(
                self.pool,
                chain([first], tasks),
                on_done,
                limit=limit,
                tick=tick,
                say=lambda text: self._say(f"{progress.stage}: {text}"),
                on_failure=on_failure,
                alike=alike,
            )
        finally:
            for listener in listeners:
                listener.close()
        return kept

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
