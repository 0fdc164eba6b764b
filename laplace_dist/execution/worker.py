"""The worker: one process, one model, one task at a time; the commit of one may go on while the next is computed."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from laplace_dist.execution.imports import uncollected

with uncollected():
    import torch

    from laplace_dist.config.settings import Config
    from laplace_dist.errors import SettingsError
    from laplace_dist.execution.kernels import passes, use_deterministic_kernels, use_precision
    from laplace_dist.execution.memory import outcome_with_memory
    from laplace_dist.execution.raised import Raised, outcome_of
    from laplace_dist.execution.tasks import Answer, Task
    from laplace_dist.stages.context import Context


class Worker:
    """The Ray actor: one process, one model, one task at a time.

    At most one commit goes on beside a task, so that there are at most two tasks' sums.

    Args:
        config: The job's settings.
        path: Entries of the driver's `sys.path` where the user's modules may lie.
        directory: The driver's working directory, taken over where it exists.
        gpu: Whether this worker was given a GPU.
    """

    def __init__(self, config: Config, path: list[str], directory: str, gpu: bool) -> None:
        self._config, self._gpu = config, gpu
        self._committer = ThreadPoolExecutor(1)
        self._commit: Future | None = None
        sys.path.extend(entry for entry in path if entry not in sys.path)
        if os.path.isdir(directory):
            os.chdir(directory)

    def start(self) -> Answer:
        """Fix what the bits depend on, and the allocator's habits; an empty receipt, or what that raised."""
        return Answer(outcome_of(self._start))

    def run(self, task: Task) -> Answer:
        """Carry out a task; if it gives a call that commits, that goes on beside the next one, unless the one before failed."""
        ended: list[Mapping[str, Any] | Raised | None] = []
        with passes(self._config.precision, "cuda" if self._gpu else "cpu"):
            outcome = outcome_with_memory(lambda: self._context.begin(task), let_go=lambda: ended.append(self._wait()))
        before = ended[0] if ended else self._wait()
        if not callable(outcome):
            return Answer(outcome, before)
        if isinstance(before, Raised):  # this worker is not used again
            return Answer(outcome_of(outcome), before)
        self._commit = self._committer.submit(outcome_of, outcome)
        return Answer(None, before)

    def finish(self) -> Answer:
        """Wait for the commit that goes on."""
        return Answer(self._wait())

    def _wait(self) -> Mapping[str, Any] | Raised | None:
        commit, self._commit = self._commit, None
        return None if commit is None else commit.result()

    def _start(self) -> Mapping[str, Any]:
        gc.freeze()  # what is imported stays: a look at all of that takes 0.2 s, beside the first batches
        _settle_allocator()
        torch.set_num_threads(self._config.cpus_per_worker)
        if self._gpu and not torch.cuda.is_available():
            raise SettingsError(
                f"gpus_per_worker={self._config.gpus_per_worker}: Ray gave this worker a GPU, but torch cannot use one "
                "on that node. Install a CUDA build of torch there, or set gpus_per_worker to 0."
            )
        self._context = Context(self._config, "cuda" if self._gpu else "cpu")
        use_precision(self._config.precision)
        if self._gpu:
            use_deterministic_kernels()
        return {}


_MEGABYTE = 1 << 20
# M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h. Larger blocks, as sums and whole chunks of them that were
# compressed are, go back to the kernel at once.
_HABITS = {-8: 1, -3: 14 * _MEGABYTE, -1: 128 * _MEGABYTE}


def _settle_allocator() -> None:
    """Have glibc's allocator serve all threads from one heap, and keep what is freed for the next batch, where there is glibc.

    By default each of the threads that compress and write chunks gets a heap of its own, and each of these keeps tens of
    megabytes after they are freed: some 200 MB in the end, which no computation needs. The memory of one batch is handed
    back to the kernel, which clears it for the next one: up to a tenth of the time of a small convolutional network. What
    is kept is at most what the last of these options says.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        for option, value in _HABITS.items():
            allocator.mallopt(option, value)


def import_path() -> list[str]:
    """Return the entries of `sys.path` that belong to the user rather than to this Python installation."""
    prefixes = (sys.prefix, sys.base_prefix)
    own = [os.path.abspath(entry or os.curdir) for entry in sys.path]
    return [entry for entry in own if not entry.startswith(prefixes) and os.path.isdir(entry)]
