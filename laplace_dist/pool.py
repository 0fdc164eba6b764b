"""The Ray actors that carry out tasks: started, given one task at a time, dropped when anything goes wrong with them."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from laplace_dist.config import Config
from laplace_dist.errors import CheckpointError, RunFailed, StorageError
from laplace_dist.loop import Event, Task
from laplace_dist.worker import Worker


def _import_path() -> list[str]:
    """Return the entries of `sys.path` that belong to the user rather than to this Python installation."""
    prefixes = (sys.prefix, sys.base_prefix)
    own = [os.path.abspath(entry or os.curdir) for entry in sys.path]
    return [entry for entry in own if not entry.startswith(prefixes) and os.path.isdir(entry)]


class Pool:
    """Driver-owned actors, one task in flight each; a lost one is replaced, never restarted by Ray.

    Args:
        config: The job's settings, handed to every worker.
        size: Number of workers.
        cpus: CPUs that each one reserves.
        gpus: GPUs that each one reserves.
        say: Where lines for people go.
    """

    def __init__(self, config: Config, size: int, cpus: float, gpus: float, say: Any = print) -> None:
        import ray

        self.size, self.need, self._say = size, {"CPU": cpus, "GPU": gpus}, say
        self._ray = ray
        self._actor = ray.remote(Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=1
        )
        self._arguments = (config, _import_path(), os.getcwd(), gpus > 0)
        self._idle: list[Any] = []
        self._flight: dict[Any, tuple[Any, Task | None, float]] = {}
        self._hint_at = time.monotonic() + 30

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most the pool's size; they come to life in the background."""
        while len(self._idle) + len(self._flight) < min(wanted, self.size):
            actor = self._actor.remote(*self._arguments)
            self._flight[actor.start.remote()] = (actor, None, float("inf"))

    @property
    def idle(self) -> int:
        """Number of workers that wait for a task."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """Number of workers with a task in flight."""
        return sum(task is not None for _, task, _ in self._flight.values())

    def submit(self, task: Task, timeout: float | None) -> None:
        """Give a task to an idle worker.

        Args:
            task: The task.
            timeout: Seconds after which the worker is given up; None for no limit.
        """
        actor = self._idle.pop()
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        self._flight[actor.run.remote(task.target, dict(task.kwargs))] = (actor, task, deadline)

    def wait(self, seconds: float) -> list[Event]:
        """Return what happened: tasks that finished, failed, timed out, workers that could not start."""
        ready, _ = self._ray.wait(list(self._flight), num_returns=1, timeout=seconds)
        events = [self._settle(ref) for ref in ready]
        now = time.monotonic()
        for ref, (actor, task, deadline) in list(self._flight.items()):
            if now > deadline:
                del self._flight[ref]
                self._ray.kill(actor, no_restart=True)
                events.append(Event(task, failure="it exceeded segment_timeout"))
        self._hint(now)
        return [event for event in events if event is not None]

    def _settle(self, ref: Any) -> Event | None:
        actor, task, _ = self._flight.pop(ref)
        errors = self._ray.exceptions
        try:
            receipt = self._ray.get(ref)
        except errors.RayTaskError as error:
            self._ray.kill(actor, no_restart=True)
            cause = error.cause if isinstance(error.cause, Exception) else error
            lasting = isinstance(cause, (ValueError, CheckpointError, RunFailed))
            if lasting and not isinstance(cause, StorageError):
                return Event(task, refusal=cause)
            return Event(task, failure=f"{type(cause).__name__}: {cause}")
        except errors.RayError as error:
            self._ray.kill(actor, no_restart=True)
            return Event(task, failure=self._why_it_died(error))
        self._idle.append(actor)
        return Event(task, receipt=receipt) if task is not None else None

    def _why_it_died(self, error: Exception) -> str:
        if getattr(error, "actor_init_failed", False):
            return f"a worker could not be set up: {str(error).strip().splitlines()[-1]}"
        if isinstance(error, self._ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
            return "Ray ended the worker because its node ran low on memory"
        return "the worker's process or node died (killed, out of memory, or a crash in native code)"

    def _hint(self, now: float) -> None:
        """Say from time to time that workers wait for resources, since Ray itself says nothing here."""
        starting = sum(task is None for _, task, _ in self._flight.values())
        if starting and not self._idle and not self.busy and now > self._hint_at:
            self._hint_at = now + 30
            free = self._ray.available_resources()
            self._say(
                f"waiting for {starting} worker(s) of {self.need['CPU']:g} CPU and {self.need['GPU']:g} GPU; free now: "
                f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
            )

    def close(self) -> None:
        """End every worker."""
        for actor in [*self._idle, *(actor for actor, _, _ in self._flight.values())]:
            self._ray.kill(actor, no_restart=True)
        self._idle, self._flight = [], {}
