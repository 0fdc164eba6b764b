"""The worker: one process, one model, one task at a time."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.execution.kernels import use_deterministic_kernels, use_precision
from laplace_dist.execution.raised import Raised, outcome_of
from laplace_dist.execution.tasks import Task
from laplace_dist.stages.context import Context


class Worker:
    """The Ray actor: one process, one model, one task at a time.

    Args:
        config: The job's settings.
        path: Entries of the driver's `sys.path` where the user's modules may lie.
        directory: The driver's working directory, taken over where it exists.
        gpu: Whether this worker was given a GPU.
    """

    def __init__(self, config: Config, path: list[str], directory: str, gpu: bool) -> None:
        self._config, self._gpu = config, gpu
        sys.path.extend(entry for entry in path if entry not in sys.path)
        if os.path.isdir(directory):
            os.chdir(directory)

    def start(self) -> Mapping[str, Any] | Raised:
        """Fix what the bits depend on, and the allocator's habits; returns nothing, or what that raised."""
        return outcome_of(self._start)

    def run(self, task: Task) -> Mapping[str, Any] | Raised:
        """Carry out a task and return its receipt, or what it raised."""
        return outcome_of(lambda: self._context.carry_out(task))

    def _start(self) -> Mapping[str, Any]:
        _share_one_heap()
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


def _share_one_heap() -> None:
    """Have glibc's allocator serve all threads from one heap, where there is glibc.

    By default each of the threads that compress and write chunks gets an own one, and each of these keeps tens of
    megabytes after they are freed: some 200 MB in the end, which no computation needs.
    """
    arena_max = -8  # M_ARENA_MAX in malloc.h
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        allocator.mallopt(arena_max, 1)
