"""The Ray actors that carry out tasks: started, given one task at a time, dropped when anything goes wrong with them."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.execution.failures import LESS_MEMORY, lasts, why_it_failed
from laplace_dist.execution.tasks import Event, Task
from laplace_dist.execution.timeouts import Limit
from laplace_dist.execution.worker import Worker

RESTS = 0.5, 16.0  # seconds before another worker is started after one could not be: at first, and at most


def why_it_died(error: Exception) -> str:
    """Return what Ray says of a dead worker as a phrase."""
    from ray.exceptions import OutOfMemoryError

    if getattr(error, "actor_init_failed", False):
        return f"a worker could not be set up: {str(error).strip().splitlines()[-1]}"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
        return f"Ray ended the worker because its node ran low on memory. {LESS_MEMORY}"
    return (
        "the worker's process or node died (killed, or a crash in native code; if it was killed for its memory, lower "
        "--num-workers or --batch-size)"
    )


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
        self._rest, self._start_at = RESTS[0], 0.0
        self._hint_at = time.monotonic() + 30

    def top_up(self, wanted: int) -> None:
        """Start workers until there are `wanted`, at most the pool's size; they come to life in the background.

        None is started for a while after one could not be: nodes that are gone take time to be noticed.
        """
        if time.monotonic() < self._start_at:
            return
        while len(self._idle) + len(self._flight) < min(wanted, self.size):
            actor = self._actor.remote(*self._arguments)
            self._flight[actor.start.remote()] = (actor, None, time.monotonic())

    @property
    def idle(self) -> int:
        """Number of workers that wait for a task."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """Number of workers with a task in flight."""
        return sum(task is not None for _, task, _ in self._flight.values())

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker."""
        actor = self._idle.pop()
        self._flight[actor.run.remote(task)] = (actor, task, time.monotonic())

    def wait(self, seconds: float, limit: Limit) -> list[Event]:
        """Return what happened: tasks that finished, failed, took too long, workers that could not start."""
        if not self._flight:
            time.sleep(min(seconds, RESTS[0]))
            return []
        self._ray.wait(list(self._flight), num_returns=1, timeout=seconds)
        # All that have finished by now: if this process was suspended, they are not late.
        ready, _ = self._ray.wait(list(self._flight), num_returns=len(self._flight), timeout=0)
        events = [self._settle(ref) for ref in ready]
        now = time.monotonic()
        for ref, (actor, task, begun) in list(self._flight.items()):
            if task is not None and limit.seconds is not None and now - begun > limit.seconds:
                del self._flight[ref]
                self._ray.kill(actor, no_restart=True)
                events.append(Event(task, failure=f"its worker seems to hang: it took longer than {limit}"))
        self._hint(now)
        return [event for event in events if event is not None]

    def _settle(self, ref: Any) -> Event | None:
        actor, task, begun = self._flight.pop(ref)
        errors = self._ray.exceptions
        try:
            receipt = self._ray.get(ref)
        except errors.RayTaskError as error:
            self._ray.kill(actor, no_restart=True)
            cause = error.cause if isinstance(error.cause, Exception) else error
            if lasts(cause):
                return Event(task, refusal=cause)
            return self._lost(task, why_it_failed(cause))
        except errors.RayError as error:
            self._ray.kill(actor, no_restart=True)
            return self._lost(task, why_it_died(error))
        self._idle.append(actor)
        self._rest = self._rest if task is not None else RESTS[0]
        return Event(task, receipt=receipt, seconds=time.monotonic() - begun) if task is not None else None

    def _lost(self, task: Task | None, why: str) -> Event:
        if task is None:
            self._start_at = time.monotonic() + self._rest
            self._rest = min(2 * self._rest, RESTS[1])
        return Event(task, failure=why)

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
