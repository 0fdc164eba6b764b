"""The worker: the model is loaded once; then segment -> laplace accumulate -> partial, and any other task by name."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laplace_dist import data, partials, posterior
from laplace_dist.config import Config
from laplace_dist.errors import SettingsError
from laplace_dist.plan import Plan, Segment
from laplace_dist.resume import load_run_weights, read_plan
from laplace_dist.store import Store


class Context:
    """What a task may use. Everything is opened on first use, in the process that uses it, and kept.

    Args:
        config: The job's settings; the checkpoint is an absolute path or a URL.
        device: `cpu` or `cuda`.
    """

    def __init__(self, config: Config, device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._splits: dict[str, Any] = {}
        self._posterior: tuple[Any, Any] | None = None

    @cached_property
    def store(self) -> Store:
        """The checkpoint."""
        return open_store(self.config)

    @cached_property
    def plan(self) -> Plan:
        """The plan, as committed by the driver."""
        return read_plan(self.store)

    @cached_property
    def model(self) -> nn.Module:
        """The run's model with the run's own weights, in eval mode, on the device."""
        model = data.load_model(self.config.model_copy(update={"weights": None}))
        load_run_weights(self.store, self.plan, model)
        return model.to(self.device)

    @cached_property
    def la(self) -> Any:
        """A Laplace object that has seen one example and can accumulate sums.

        Raises:
            SettingsError: Its sums are not those of the plan.
        """
        la = initialized(self.config, self.model, self.split("train"))
        if plain(la.sums_spec()) != self.plan.spec:
            raise SettingsError(
                "this worker finds other factors in the model than the driver did: the same versions of laplace_dist, "
                "torch and of the code behind --model must be installed on every node."
            )
        return la

    def posterior(self, version: str, tuning: str | None = None) -> Any:
        """Return a posterior version as a fitted object, with a tuning's prior if given; only the last one is kept."""
        if self._posterior is None or self._posterior[0] != (version, tuning):
            self._posterior = None
            la = posterior.build(self.store, self.plan, self.model, version)
            if tuning is not None:
                posterior.apply_tuning(self.store, la, tuning)
            self._posterior = (version, tuning), la
        return self._posterior[1]

    def split(self, name: str) -> Any:
        """Return a split of the data set."""
        if name not in self._splits:
            self._splits[name] = data.load_split(self.config, name)
        return self._splits[name]

    def batches(self, split: str, start: int, stop: int) -> Any:
        """Yield `(offset, x, y)` for a contiguous range of a split, on the device."""
        for offset, x, y in data.batches(self.split(split), start, stop, self.config.batch_size):
            yield offset, to_device(x, self.device), to_device(y, self.device)


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or every tensor in a mapping, to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if hasattr(value, "items"):
        return type(value)({key: to_device(item, device) for key, item in value.items()})
    return value


def open_store(config: Config) -> Store:
    """Open the checkpoint that the settings name."""
    return Store(config.checkpoint, config.storage_options)


def initialized(config: Config, model: nn.Module, dataset: Any) -> Any:
    """Build the Laplace object and let it look at one example, which tells it the outputs and the last layer.

    Raises:
        ValueError: The core library does not have this combination of settings, or cannot use the model.
    """
    la = posterior.new_laplace(config.model_dump(), model)
    _, x, _ = next(data.batches(dataset, 0, 1, 1))
    la.initialize(to_device(x, next(model.parameters()).device))
    return la


def plain(spec: Any) -> dict[str, Any]:
    """Return the specification of the sums as it looks after a trip through JSON."""
    return json.loads(json.dumps(spec.to_json()))


def map_segment(context: Context, segment: dict[str, Any]) -> dict[str, Any]:
    """Accumulate the curvature of one segment and commit it as a partial.

    Args:
        context: The worker's model, data and store.
        segment: A segment's `id`, `start` and `stop`.

    Returns:
        A small receipt: who won the commit, the number of bytes and seconds it took.
    """
    part = Segment(**segment)
    sums = context.la.zero_sums()
    for offset, x, y in context.batches("train", part.start, part.stop):
        context.la.accumulate(sums, x, y, offset=offset)
    receipt = partials.commit_partial(
        context.store, context.plan, part, sums.to_tensors(), sums.n_data, partials.new_attempt()
    )
    return {"segment": part.id, "examples": part.stop - part.start, "won": receipt.won, "seconds": receipt.seconds}


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
