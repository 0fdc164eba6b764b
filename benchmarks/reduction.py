"""The reduction of a ViT-B: bytes per second against the disk's, where the time goes, and requests per segment.

    python benchmarks/costs.py reduction

The plan is that of the whole network with 64 segments. A part costs the same whatever the number of parts, so only some of them
are written to disk, 2 GiB each. Before each figure the files are dropped from the page cache (`POSIX_FADV_DONTNEED`).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc

from laplace_dist.plan.parts import Part
from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.run import attempts, layout, partial_manifests, partials
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.combination import Window
from laplace_dist.run.layout import partial_key
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.provenance import environment
from laplace_dist.run.windows import inputs_digest
from laplace_dist.stages.reduce import SumPart
from laplace_dist.storage.sealed_json import seal_json

SEGMENTS, WRITTEN, ROUNDS = 64, 4, 3
ENVIRONMENT = environment("cpu")


def vit_b(segments: int = SEGMENTS) -> Plan:
    """Return the plan of a ViT-B/16: per layer A and B of its weight and B of its bias, 150 symmetric factors."""
    layers = {"patch": (768, 768), "head": (768, 1000)}
    for block in range(12):
        sizes = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
        layers |= {f"blocks.{block}.{name}": size for name, size in sizes.items()}
    factors = {}
    for name, (inputs, outputs) in layers.items():
        for factor, size in ((f"{name}.weight/A", inputs), (f"{name}.weight/B", outputs), (f"{name}.bias/B", outputs)):
            factors[factor] = {"shape": [size, size], "symmetric": True}
    data, settings = {"length": segments, "sha256": "0" * 64}, {"batch_size": 1, "segment_size": 1}
    model = {"path": "m:f", "args": {}}
    return build_plan(settings, data=data, weights="0" * 64, model=model, spec={"factors": factors, "dtype": "float32"})


def numbers(part: Part) -> np.ndarray:
    """Return numbers that compress as sums do: hardly."""
    return np.random.default_rng(part.start).standard_normal(part.stop - part.start)


def write(store: Checkpoint, plan: Plan, parts: list[Part]) -> None:
    """Write these parts of every partial, with manifests whose other entries name nothing that is there."""
    values = {part.id: numbers(part) for part in parts}
    for segment in plan.segments:
        attempt = attempts.new_attempt()
        prefix = f"partials/{segment.id}/{attempt}"
        entries = store.write_arrays(prefix, values)
        absent = next(iter(entries.values()))
        named = {part.id: {**absent, "shape": [part.stop - part.start]} for part in plan.parts} | entries
        manifest = {
            "format_version": plan.format_version,
            "plan": plan.digest,
            "segment": segment.id,
            "start": segment.start,
            "stop": segment.stop,
            "attempt": attempt,
            "n_data": 1,
            "prefix": prefix,
            "arrays": named,
            "loss": 1.0,
            "data_sha256": "0" * 64,
            "environment": ENVIRONMENT,
        }
        store.create(partial_key(segment.id), seal_json(manifest))


def files_of(store: Checkpoint, part: Part) -> list[Path]:
    """Return the chunks of one part of all partials."""
    return sorted(Path(store.url).glob(f"partials/*/*/{part.id}/c/*"))


def drop(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read_all(paths: list[Path]) -> None:
    """Read files one after the other into one buffer."""
    buffer = bytearray(max(path.stat().st_size for path in paths))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            file.readinto(buffer)


def _carry_out(url: str, task: SumPart) -> float:
    """Sum one part in this process, as a worker does; returns the CPU time."""
    store = Checkpoint(url)
    before = time.process_time()
    plan = read_plan(store)
    task.run(SimpleNamespace(window_of=lambda basis: Window(store, plan), device="cpu"))
    return time.process_time() - before


def _removed(store: Checkpoint, parts: list[Part]) -> None:
    for part in parts:
        store.delete_tree(layout.part_key(part.id))


@dataclass(frozen=True)
class Found:
    """One round: which workers, the disk's rate and the tasks' in bytes per second, and the tasks' seconds."""

    who: str
    parts: int
    each: float
    disk: float
    rate: float
    seconds: float
    cpu: float

    @property
    def share(self) -> float:
        """The tasks' rate over the disk's."""
        return self.rate / self.disk


def rates(store: Checkpoint, plan: Plan, parts: list[Part]) -> Iterator[Found]:
    """Yield the rate of the disk and that of the tasks, cold: one worker per CPU, as jobs have them, then one."""
    manifests = list(partial_manifests.manifests(store, plan))
    tasks = [SumPart(plan.digest, part, inputs_digest(manifests, part)) for part in parts]
    paths = [path for part in parts for path in files_of(store, part)]
    size, workers = sum(path.stat().st_size for path in paths), min(len(os.sched_getaffinity(0)), len(tasks))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(sleep, [0.5] * workers))  # until all have started
        for _ in range(ROUNDS):
            drop(paths)
            disk = size / seconds_of(lambda: read_all(paths))
            for count, who in ((workers, f"{workers} workers"), (1, "one worker")):
                some = tasks if count > 1 else tasks[:1]
                of = sum(path.stat().st_size for task in some for path in files_of(store, task.part))
                _removed(store, parts)
                drop(paths)
                cpu: list[float] = []
                seconds = seconds_of(lambda: cpu.extend(pool.map(_carry_out, [store.url] * len(some), some)))  # noqa: B023
                yield Found(who, len(some), of / len(some), disk, of / seconds, seconds, sum(cpu))
        _removed(store, parts)
        last = paths[-len(paths) // len(tasks) :]
        read_all(last)
        warm = seconds_of(lambda: list(pool.map(_carry_out, [store.url], tasks[-1:])))
        print(f"reduction, in the page cache, one worker: {size / len(tasks) / warm / 1e6:.0f} MB/s", flush=True)


def measured(folder: str) -> list[Found]:
    """Return the rounds in which all workers sum."""
    store, plan, parts = _stored(folder)
    return [found for found in rates(store, plan, parts) if found.parts == len(parts)]


def shares(store: Checkpoint, part: Part) -> None:
    """Print the time of each step alone, per part of one partial, in the page cache."""
    paths = files_of(store, part)[: len(files_of(store, part)) // SEGMENTS]
    stored = [path.read_bytes() for path in paths]
    codec = Blosc()
    decoded = [np.frombuffer(codec.decode(data[:-4])) for data in stored]
    total = np.zeros(max(len(values) for values in decoded))
    steps: dict[str, Callable[[Any, Any], object]] = {
        "read": lambda data, values: [path.read_bytes() for path in paths[:1]],
        "crc32c": lambda data, values: google_crc32c.value(data),
        "decode": lambda data, values: codec.decode(data[:-4]),
        "sha256": lambda data, values: hashlib.sha256(values).digest(),
        "copy": lambda data, values: values.copy(),
        "add": lambda data, values: np.add(total[: len(values)], values, out=total[: len(values)]),
    }
    found = {}
    for name, step in steps.items():
        pairs = [partial(step, *one) for one in zip(stored, decoded, strict=True)]
        found[name] = min(seconds_of(lambda: [call() for call in pairs]) for _ in range(5))  # noqa: B023
    print(
        "reduction, ms per part and partial: " + ", ".join(f"{n} {1000 * s:.0f}" for n, s in found.items()), flush=True
    )


class Counting(Checkpoint):
    """Counts the requests that a commit makes, and sends none."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.count, self.held = 0, {}

    def read(self, key: str) -> bytes:  # noqa: D102
        self.count += 1
        return self.held[key]

    def create(self, key: str, data: bytes) -> bool:  # noqa: D102
        self.count += 1
        return True

    def _put(self, key: str, data: bytes) -> None:
        self.count += 1
        self.held[key] = data


def requests(plan: Plan) -> None:
    """Print how many requests the commit of one segment makes: one for each object that is written or read back."""
    import torch

    store = Counting("memory://counted/run")
    store.held[layout.PLAN] = seal_json(plan.to_values())  # which a commit looks at
    sums = {name: torch.zeros(factor["shape"]) for name, factor in plan.spec["factors"].items()}
    sums["loss"] = torch.tensor(1.0)
    partials.commit_partial(store, plan, plan.segments[0], sums, 1, "a", data_sha256="0" * 64, environment=ENVIRONMENT)
    entries = plan.places[-1].stop
    print(
        f"reduction, requests: {store.count} per segment on an object store, {len(plan.spec['factors'])} factors, {entries:,} "
        f"entries ({entries * 4 / 2**30:.2f} GiB as float32, {entries * 8 / 2**30:.2f} GiB stored) in {len(plan.parts)} parts",
        flush=True,
    )


def measure(places: dict[str, tuple[str, dict]]) -> None:
    """Print all of it, on the directory."""
    plan = vit_b()
    requests(plan)
    store, plan, parts = _stored(places["directory"][0])
    for found in rates(store, plan, parts):
        print(
            f"reduction, {found.parts} parts of {found.each / 2**30:.1f} GiB, {found.who}: disk {found.disk / 1e6:.0f} MB/s, "
            f"the tasks {found.rate / 1e6:.0f} MB/s ({100 * found.share:.0f} %), {found.seconds:.1f} s with "
            f"{found.cpu:.1f} s of CPU",
            flush=True,
        )
    shares(store, parts[0])


def _stored(folder: str) -> tuple[Checkpoint, Plan, list[Part]]:
    """Return a run whose partials have some of their parts."""
    plan = vit_b()
    store = Checkpoint(f"{folder}/reduction")
    store.create(layout.PLAN, seal_json(plan.to_values()))
    parts = plan.parts[:WRITTEN]
    write(store, plan, parts)
    return store, plan, parts
