"""A store that dies at its k-th operation, before it, after it or in the middle; and a run without model or Ray."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch
from given_weights import Given
from torch import nn

from laplace_dist.plan.plan import Plan, build_plan
from laplace_dist.run import (
    attempts,
    layout,
    lifecycle,
    ownership,
    partial_manifests,
    partials,
    pointer,
    versions,
    windows,
)
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.combination import Window, alone
from laplace_dist.run.provenance import environment
from laplace_dist.stages import reduce

SPEC = {
    "structure": "kron",
    "dtype": "float32",
    "factors": {"w/A": {"shape": [3, 3], "symmetric": True}, "b": {"shape": [2], "symmetric": False}},
}
WEIGHTS = b"weights"
MODEL = nn.Sequential(nn.Linear(3, 2))
ORIGIN = {"data_sha256": "0" * 64, "environment": environment("cpu")}


class Crash(BaseException):
    """The process is gone: nothing catches this."""


class CrashingStore(Checkpoint):
    """Raises `Crash` at the `at`-th operation and at every later one, as a dead process does nothing more.

    Args:
        url: Local directory.
        at: Number of the fatal operation, from 1; 0 for none.
        when: `before` its effect, `after` it, or in the `middle`: with half of the bytes written, or half deleted.
    """

    def __init__(self, url, at=0, when="before"):
        super().__init__(url)
        self.at, self.when, self.operations = at, when, []

    def under(self, prefix):
        """Of a place within, whose operations count as its own."""
        inner = CrashingStore(f"{self.url}/{prefix}")
        inner._do = self._do
        return inner

    def _do(self, name, key, act, half=lambda: None):
        if self.at and len(self.operations) >= self.at:
            raise Crash
        self.operations.append(f"{name} {key}")
        if len(self.operations) != self.at:
            return act()
        if self.when == "after":
            act()
        elif self.when == "middle":
            half()
        raise Crash

    def read(self, key):
        return self._do("read", key, lambda: super(CrashingStore, self).read(key))

    def exists(self, key):
        return self._do("exists", key, lambda: super(CrashingStore, self).exists(key))

    def list(self, prefix="", *, recursive=True):
        return self._do("list", prefix, lambda: super(CrashingStore, self).list(prefix, recursive=recursive))

    def create(self, key, data):
        return self._do("create", key, lambda: super(CrashingStore, self).create(key, data))

    def replace(self, key, data):
        return self._do("replace", key, lambda: super(CrashingStore, self).replace(key, data))

    def delete_tree(self, prefix):
        def half():
            for key in Checkpoint.list(self, prefix)[::2]:
                Checkpoint.delete_tree(self, key)

        return self._do("delete", prefix, lambda: super(CrashingStore, self).delete_tree(prefix), half)

    def _put(self, key, data):
        put = super()._put
        return self._do("put", key, lambda: put(key, data), lambda: put(key, data[: len(data) // 2]))

    def _flush(self, prefix):
        return self._do("flush", prefix, lambda: super(CrashingStore, self)._flush(prefix))


# ------------------------------------------------------------------ a run in miniature


def make_plan(segments: int = 3) -> Plan:
    settings = {"batch_size": 4, "segment_size": 4, "hessian_structure": "kron"}
    data = {"length": 4 * segments, "sha256": "d"}
    return build_plan(settings, data=data, weights="w", model={"path": "m:f", "args": {}}, spec=SPEC)


def sums_of(segment) -> dict[str, torch.Tensor]:
    """Return what a worker finds for a segment: always the same, and rounded differently in another order of adding."""
    generator = torch.Generator().manual_seed(segment.start)
    x = torch.randn(5, 3, generator=generator) * 10 ** (segment.start / 4)
    loss = torch.tensor([0.1, 0.2, 0.3][segment.start // 4], dtype=torch.float64)
    return {"w/A": x.T @ x, "b": torch.randn(2, generator=generator), "loss": loss}


def start(store: Checkpoint, plan: Plan) -> Plan:
    """Start or continue a run; returns its plan, which may have an id of its own."""
    given = {"model": MODEL, "weights": Given(WEIGHTS), "probe": lambda: None, "config_yaml": "seed: 0\n"}
    return lifecycle.open_run(store, plan, **given)[0]


def work(store: Checkpoint, plan: Plan, segment) -> partials.Receipt:
    return partials.commit_partial(store, plan, segment, sums_of(segment), 4, attempts.new_attempt(), **ORIGIN)


def finish(store: Checkpoint, plan: Plan) -> str:
    """Reduce and promote as the driver does; returns the version."""
    context = SimpleNamespace(store=store, plan=plan, window_of=lambda digest: Window(store, plan), device="cpu")
    window = windows.find_window(store, plan)
    if window is None:
        manifests = list(partial_manifests.manifests(store, plan))
        for task in reduce.part_tasks(store, plan, manifests):
            task.run(context)
        window = windows.commit_window(store, plan, manifests)
    terms = alone(store, plan, window)
    version = versions.version_of(terms)
    if not ownership.has(store, plan, layout.version_key(version)):
        receipts = [task.run(context)["factors"] for task in reduce.factor_tasks(plan, terms)]
        versions.commit_version(store, plan, terms, receipts)
    if not store.exists(layout.CURRENT) or pointer.read_current(store)["version"] != version:
        pointer.write_current(store, plan, version, None)
    return version


def whole_run(store: Checkpoint, plan: Plan) -> str:
    """Start or continue a run and bring it to its end."""
    plan = start(store, plan)
    for segment in lifecycle.remaining(plan, lifecycle.committed(store, plan)):
        work(store, plan, segment)
    return finish(store, plan)


def state(store: Checkpoint, plan: Plan) -> dict:
    """Read all that a reader can: each committed segment's numbers, and the current version's; whole or an error."""
    if not store.exists(layout.PLAN):
        return {}
    assert lifecycle.read_plan(store) == plan
    found: dict = {}
    for id_, manifest in lifecycle.committed(store, plan).items():
        found[id_] = {name: value.tobytes() for name, value in partials.read_factors(store, plan, manifest).items()}
    if store.exists(layout.WEIGHTS):
        found["weights"] = {"": store.read(layout.WEIGHTS)}
    if store.exists(layout.CURRENT):
        version = pointer.read_current(store)["version"]
        manifest = versions.read_version(store, plan, version)
        factors = manifest["factors"]
        found["current"] = {
            "version": version.encode(),
            "loss": repr(manifest["loss"]).encode(),
            **{n: store.read_array(p["prefix"], n, p["entry"]).tobytes() for n, p in factors.items()},
        }
    return found


def serial(plan: Plan) -> dict:
    """Return the state that a run without store, crash or parallel work ends in, but for the version's name."""
    parts = {segment.id: sums_of(segment) for segment in plan.segments}
    found = {i: {n: sums[n].double().numpy().tobytes() for n in ("w/A", "b")} for i, sums in parts.items()}
    found["current"] = {"loss": repr(math.fsum(float(sums["loss"]) for sums in parts.values())).encode()}
    for name in ("w/A", "b"):
        total = np.zeros(parts["000000"][name].shape)
        for sums in parts.values():
            total = total + sums[name].numpy().astype(np.float64)
        found["current"][name] = total.tobytes()
    return found
