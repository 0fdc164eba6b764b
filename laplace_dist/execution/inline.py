"""An executor without Ray: every task is carried out in this process, one after the other.

For debugging, notebooks and tests. The tasks, the store and the bits are those of any other run; what is missing is
parallelism, the time-outs of tasks, and the protection of this process from what a task does to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from laplace.linalg.memory import free_bytes
from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.execution.failures import event_of
from laplace_dist.execution.kernels import deterministic_kernels, passes, precision
from laplace_dist.execution.memory import outcome_with_memory
from laplace_dist.execution.raised import Raised
from laplace_dist.execution.tasks import Event, Task
from laplace_dist.execution.timeouts import Limit
from laplace_dist.stages.context import Context


class Inline:
    """The executor of `--ray-address inline`, and of `laplace_dist.fit(config, executor=laplace_dist.Inline)`.

    Args:
        config: The job's settings.
        say: Where lines for people go.
    """

    def __init__(self, config: Config, say: Callable[[str], None] = print) -> None:
        self._config, self._say = config, say

    def device_type(self) -> str:
        """Return `cuda` or `cpu`: a GPU is used if the settings ask for one, or say nothing and there is one."""
        gpus = self._config.gpus_per_worker
        return "cuda" if (torch.cuda.is_available() if gpus is None else gpus > 0) else "cpu"

    def memory(self, device: str) -> int | None:
        """Return the bytes that are free for this process."""
        return free_bytes(device) if device == "cpu" or torch.cuda.is_available() else None

    def admit(self, device: str) -> None:
        """Refuse a GPU where torch cannot use one here."""
        if device == "cuda" and not torch.cuda.is_available():
            config, why = self._config, "but torch cannot use a GPU in this process"
            if config.gpus_per_worker:
                raise SettingsError(f"--gpus-per-worker: got {config.gpus_per_worker:g}, {why}; leave it out")
            if config.device == "cuda":
                raise SettingsError(f"--device: got 'cuda', {why}; give --device cpu")
            raise SettingsError(f"--device: the run has begun on GPUs, {why}; go on with it where there is one")

    def pool(self, device: str, expected: int | None = None) -> InlinePool:
        """Return the one worker that there is; refusals as of `admit`."""
        self.admit(device)
        self._say("inline: every task is carried out in this process")
        return InlinePool(self._config, device)

    def close(self) -> None:
        """Do nothing: nothing was taken."""


class InlinePool:
    """One worker in this process; a task is carried out when its outcome is asked for.

    Args:
        config: The job's settings.
        device: `cpu` or `cuda`.
    """

    size = alive = 1

    def __init__(self, config: Config, device: str = "cpu") -> None:
        self._config = config
        self._context = Context(config, device)
        self._waiting: deque[Task] = deque()

    @property
    def idle(self) -> int:
        """Number of workers that wait for a task."""
        return self.size - len(self._waiting)

    @property
    def busy(self) -> int:
        """Number of workers with a task in flight."""
        return len(self._waiting)

    def top_up(self, wanted: int) -> None:
        """Do nothing: the worker is there."""

    def submit(self, task: Task) -> None:
        """Give a task to the idle worker."""
        self._waiting.append(task)

    def wait(self, seconds: float, limit: Limit) -> list[Event]:
        """Carry out one task and return what became of it; there is no limit, since nobody else could do it."""
        return [self._outcome(self._waiting.popleft())] if self._waiting else []

    def close(self) -> None:
        """Let go of the model and the data."""
        self._context.close()
        self._context = Context(self._config, self._context.device.type)

    def _outcome(self, task: Task) -> Event:
        with computing_as_a_worker(self._config, self._context.device):
            outcome = outcome_with_memory(lambda: self._context.carry_out(task))
        return event_of(task, outcome) if isinstance(outcome, Raised) else Event(task, receipt=outcome)


@contextmanager
def computing_as_a_worker(config: Config, device: torch.device) -> Iterator[None]:
    """Compute with a worker's threads and kernels, which bits depend on, and with this process's own afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads_per_worker)
    try:
        kernels = deterministic_kernels() if device.type == "cuda" else nullcontext()
        with precision(config.precision), passes(config.precision, device.type), kernels:
            yield
    finally:
        torch.set_num_threads(threads)
