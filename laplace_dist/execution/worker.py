"""The worker: one process, one model, one task at a time."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from typing import Any

import torch

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
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

    def start(self) -> int:
        """Fix what the bits depend on, and the allocator's habits; returns the process id."""
        _share_one_heap()
        torch.set_num_threads(self._config.cpus_per_worker)
        if self._gpu and not torch.cuda.is_available():
            raise SettingsError(
                f"gpus_per_worker={self._config.gpus_per_worker}: Ray gave this worker a GPU, but torch cannot use one "
                "on that node. Install a CUDA build of torch there, or set gpus_per_worker to 0."
            )
        if self._gpu:
            _deterministic_kernels()
        self._context = Context(self._config, "cuda" if self._gpu else "cpu")
        return os.getpid()

    def run(self, target: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Call `target`, written `module:function`, with this worker's context and return its receipt."""
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)(self._context, **kwargs)


def _deterministic_kernels() -> None:
    """Have CUDA add in the same order every time; an operation that cannot warns, and does as it likes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def _share_one_heap() -> None:
    """Have glibc's allocator serve all threads from one heap, where there is glibc.

    By default each of the threads that compress and write chunks gets an own one, and each of these keeps tens of
    megabytes after they are freed: some 200 MB in the end, which no computation needs.
    """
    arena_max = -8  # M_ARENA_MAX in malloc.h
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        allocator.mallopt(arena_max, 1)
