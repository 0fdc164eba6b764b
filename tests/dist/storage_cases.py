"""What the tests of storage faults share: a pool that notes what was done, and outages at chosen points."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import dist_cases
from torch import nn

from laplace_dist.errors import StorageError
from laplace_dist.execution.inline import InlinePool
from laplace_dist.run.checkpoint import Checkpoint

# Few requests, yet every kind of object: two segments, three shards each of validation and test data, one round of tuning.
SMALL = {
    "subset_of_weights": "last_layer",
    "segment_size": 24,
    "batch_size": 8,
    "grid_size": 3,
    "prior_range": [1e-4, 1e4],
    "skip_tune": False,
    "skip_evaluate": False,
}


def repeated(objects: list[str]) -> set[int]:
    """Return which of a run's objects, in order, are like their neighbours: arrays in the middle of an evaluation's shard.

    A shard has a dozen of them, which one call writes and one call reads, so that the first and the last ones stand for all.

    Args:
        objects: What each is, beginning with its folder; `chunk` or `zarr.json` in it if it is of an array.
    """
    arrays = ["evaluation" in name and ("chunk" in name or "zarr.json" in name) for name in objects]
    return {i for i in range(3, len(arrays) - 3) if all(arrays[i - 3 : i + 4])}


class Recording(InlinePool):
    """Notes the tasks that were carried out and what they returned."""

    def __init__(self, config):
        super().__init__(config)
        self.receipts = []

    def wait(self, *arguments):
        events = super().wait(*arguments)
        self.receipts += [(event.task, event.receipt) for event in events]
        return events

    def of(self, kind):
        return [receipt for task, receipt in self.receipts if isinstance(task, kind)]

    def done(self, kind):
        return [task for task, _ in self.receipts if isinstance(task, kind)]


def recorded_run(config) -> tuple[str, Recording]:
    """Carry out the stages of a run in this process; returns the version and the pool that did the work."""
    with dist_cases.inline_job(config) as job:
        job.session.pool = pool = Recording(job.config)
        job.open()
        job.map()
        version = job.reduce()
        tuning = None if config.skip_tune else job.tune(version)
        if not config.skip_evaluate:
            job.evaluate(version, tuning)
        return version, pool


class Outages:
    """Kills an S3 server when a store is about to do certain things, and brings it back some time later.

    Args:
        server: The server.
        points: `(method of Checkpoint, pattern of the key, seconds)`; each happens once, in any order.
    """

    def __init__(self, monkeypatch, server, points):
        self.fired = []
        self._server, self._points, self._lock = server, list(points), threading.Lock()
        for method in {method for method, _, _ in points}:
            monkeypatch.setattr(Checkpoint, method, self._watched(method, getattr(Checkpoint, method)))

    def _watched(self, method, call):
        def watched(store, key, *arguments):
            with self._lock:
                for point in self._points:
                    if point[0] == method and re.fullmatch(point[1], key):
                        self._points.remove(point)
                        self.fired.append(f"{method} {key}")
                        self._server.outage(point[2])
                        break
            return call(store, key, *arguments)

        return watched


def model_without_storage(folder: str) -> nn.Module:
    """Return the usual model; the first worker that asks for it is told that the storage does not answer."""
    if dist_cases.in_worker():
        try:
            (Path(folder) / "refused").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            raise StorageError("s3://bucket/run/weights.safetensors: could not read it")
    return dist_cases.convnet()
