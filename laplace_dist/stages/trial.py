"""A trial: a few batches of the fit, one commit and one part's sum, in a run of their own that is thrown away."""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from laplace_dist.config.settings import Config
from laplace_dist.data import loader
from laplace_dist.data.collate import Collate
from laplace_dist.data.device import to_device
from laplace_dist.plan.estimate import Trial
from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run import partial_manifests, partials, windows
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.provenance import environment
from laplace_dist.stages import opening, resolving
from laplace_dist.stages.map import BESIDE
from laplace_dist.storage.store import Store

BATCHES = 4  # the first of which is not timed


def run(config: Config, resolved: resolving.Resolved, module_groups: int = 1) -> tuple[Plan, Trial]:
    """Carry out a trial of a fit in this process; returns the fit's plan and what the trial took.

    Args:
        config: The settings.
        resolved: What they name.
        module_groups: Number of module groups, of which the largest is tried.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoint(folder)
        own = config.model_copy(update={"checkpoint": folder})
        plan, _ = opening.begin(resolved, own, store, "cpu", lambda text: None, module_groups=module_groups)
        group = max(plan.groups, key=lambda group: group.nbytes)
        rows = group.rows if len(plan.groups) > 1 else None
        sums, batch_seconds = _batches(config, resolved, rows)
        segment = next(unit for unit in plan.units if unit.group == group.number)
        made = {"data_sha256": "0" * 64, "environment": environment("cpu")}
        tensors = sums.to_tensors()
        before = _objects(Path(folder))

        def commit() -> partials.Receipt:
            count = segment.stop - segment.start
            return partials.commit_partial(store, plan, segment, tensors, count, new_attempt(), **made)

        receipt, commit_seconds = (_beside if _bytes(tensors) <= BESIDE else _alone)(commit, config, resolved, rows)
        writes = len(_objects(Path(folder)) - before)
        trial = Trial(
            batch_seconds=batch_seconds,
            commit_seconds=commit_seconds,
            sum_seconds=_sum_seconds(store, plan, segment),
            partial_bytes=receipt.bytes,
            writes=writes,
            reads=writes + 2,  # each is read back; whose the run is is looked at before and after
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            node_bytes=_node_bytes(),
            kept_bytes=_bytes(tensors) if _bytes(tensors) <= BESIDE else 0,
        )
        return plan, trial


def _batches(
    config: Config, resolved: resolving.Resolved, rows: Mapping[str, tuple[int, int]] | None, count: int = BATCHES
) -> tuple[Any, float]:
    """Accumulate a few batches; returns the sums and the median seconds of one."""
    la, size = resolved.la, config.batch_size
    sums, times = la.zero_sums() if rows is None else la.zero_sums(rows), []
    stop = min(len(resolved.train), count * size)
    begun = _clock()
    for offset, x, y in loader.batches(resolved.train, 0, stop, size, Collate.of(config)):
        la.accumulate(sums, to_device(x, torch.device("cpu")), y, offset=offset)
        times.append(_clock() - begun)
        begun = _clock()
    return sums, statistics.median(times[1:] or times)


Commit = Callable[[], partials.Receipt]


def _alone(commit: Commit, *_: Any) -> tuple[partials.Receipt, float]:
    """Commit; returns the receipt, and the seconds that it took."""
    begun = _clock()
    return commit(), _clock() - begun


def _beside(
    commit: Commit, config: Config, resolved: resolving.Resolved, rows: Mapping[str, tuple[int, int]] | None
) -> tuple[partials.Receipt, float]:
    """Commit beside a batch of the next segment, as a worker does, so that the peak is that of both.

    Returns the receipt, and the CPU seconds that the commit took, which is what it takes away from the segment beside it.
    """
    begun = time.process_time()
    with ThreadPoolExecutor(1) as executor:
        going_on = executor.submit(commit)
        own = time.thread_time()
        _batches(config, resolved, rows, 1)[0].to_tensors()
        own = (time.thread_time() - own) * torch.get_num_threads()
        receipt = going_on.result()
    return receipt, max(0.0, time.process_time() - begun - own)


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _clock() -> float:
    """Return seconds, without those in which this thread waited for a CPU that others had, where the system says so."""
    try:
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        waited = 0
    return time.perf_counter() - waited * 1e-9


def _objects(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _sum_seconds(store: Store, plan: Plan, unit: Segment) -> float:
    """Return the seconds that one part of the partial takes to be read and added."""
    part = next(part for part in plan.parts if plan.groups[unit.group].overlap(part) is not None)
    manifests = [partial_manifests.of_part(partial_manifests.read_manifest(store, plan, unit), part)]
    begun = _clock()
    windows.sum_part(store, plan, manifests, part)
    return _clock() - begun


def _node_bytes() -> int | None:
    """Return the memory of this machine, where the system says so."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemTotal:")), None)
