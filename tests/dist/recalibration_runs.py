"""Recalibrations in miniature: the real windows, versions, pointer, leases and collection, without model, data or Ray."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from crash_store import ORIGIN, SPEC, Crash

from laplace_dist.plan.plan import build_plan
from laplace_dist.run import (
    attempts,
    layout,
    leases,
    lifecycle,
    ownership,
    partials,
    pointer,
    recalibrations,
    retention,
    tunings,
    versions,
    windows,
)
from laplace_dist.run.combination import Window, choose, is_rule, place_of, terms_of, windows_of
from laplace_dist.run.provenance import environment
from laplace_dist.stages import reduce
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.testing.simulated_store import Objects, SimulatedStore

FIRST = "w000"
SETTINGS = {"batch_size": 4, "segment_size": 4, "hessian_structure": "kron"}


class Memory(SimulatedStore):
    """A store in memory that does something before its `at`-th operation, or dies around it.

    Args:
        objects: The bucket.
        at: Number of the operation, from 1; 0 for none.
        act: What is done then; a process that is to die raises `Crash` in it.
        when: Of a death: `before` the operation, or in the `middle` of it.
        living: Keys of the signs of life of jobs that live beside this one.
    """

    def __init__(self, objects, at=0, when=None, act=None, living=()):
        super().__init__(objects)
        self.living = set(living)
        self.counter = {"count": 0, "dead": False, "operations": []}  # one for all folders of a process
        self.at, self.when, self.act = at, when, act

    def wait(self, seconds):
        """Let time pass, in which whoever lives says so."""
        clock = self.objects.clock
        clock[0] += seconds
        for key in self.living & self.objects.data.keys():
            self.objects.times[key] = clock[0]

    def _do(self, name, key, effect, half=None):
        counter = self.counter
        if counter["dead"]:
            raise Crash
        counter["count"] += 1
        counter["operations"].append(f"{name} {key}")
        if counter["count"] != self.at:
            return super()._do(name, key, effect, half)
        if self.act is not None:
            self.act(name)
            return super()._do(name, key, effect, half)
        if self.when == "middle" and half is not None:
            half()
        counter["dead"] = True
        raise Crash


def bucket():
    """Return an empty bucket, whose clock stands still until it is set."""
    clock = [0.0]
    objects = Objects(lambda: clock[0])
    objects.clock = clock
    return objects


def plan_of(name, number, run):
    data = {"length": 4, "sha256": name}
    window = {"name": name, "number": number}
    given = {"data": data, "weights": "w", "model": {"path": "m:f", "args": {}}, "spec": SPEC}
    return build_plan(SETTINGS, **given, run=run, window=window)


def sums_of(name):
    """Return what a window's data give: always the same."""
    generator = torch.Generator().manual_seed(int(name[1:]))
    x = torch.randn(5, 3, generator=generator)
    return {"w/A": x.T @ x, "b": torch.randn(2, generator=generator), "loss": torch.tensor(0.5, dtype=torch.float64)}


def sum_window(store, plan):
    """Commit the sum of a window, as map and reduce do; returns its manifest."""
    done = windows.find_window(store, plan)
    if done is not None:
        return done
    for segment in lifecycle.remaining(plan, lifecycle.committed(store, plan)):
        sums, attempt = sums_of(plan.window_name), attempts.new_attempt()
        partials.commit_partial(store, plan, segment, sums, 4, attempt, **ORIGIN)
    manifests = list(partials.manifests(store, plan))
    context = SimpleNamespace(store=store, plan=plan, window=Window(store, plan), device="cpu")
    for task in reduce.part_tasks(store, plan, manifests):
        task.run(context)
    return windows.commit_window(store, plan, manifests)


def combine(store, plan, terms):
    version = versions.version_of(terms)
    history = pointer.history_of(pointer.read_current(store)) if store.exists(layout.CURRENT) else []
    if all(entry["version"] != version for entry in history):
        versions.discard_torn(store, plan, version)
    if not ownership.has(store, plan, layout.version_key(version)):
        context = SimpleNamespace(store=store, plan=plan, window=Window(store, plan), device="cpu")
        receipts = [task.run(context)["factors"] for task in reduce.factor_tasks(plan, terms)]
        versions.commit_version(store, plan, terms, receipts)
    return version


def tune(store, plan, version):
    chosen = {"method": "none"}
    key = layout.tuning_key(version, chosen)
    if not ownership.has(store, plan, key):
        la = SimpleNamespace(
            prior_precision=torch.ones(1),
            likelihood_object=SimpleNamespace(has_noise=False, scales_logits=False),
            log_marginal_likelihood=lambda: torch.zeros(()),
        )
        tunings.commit_tuning(store, plan, key, chosen, la, environment=environment("cpu"))
    return key


def fit(store):
    """Commit the first window and make it current."""
    plan = plan_of(FIRST, 0, "run0")
    store.create(layout.PLAN, seal_json(plan.to_values()))
    sum_window(store, plan)
    version = combine(store, plan, terms_of(choose(windows_of(store, plan), "all", 1.0)))
    pointer.write_current(store, plan, version, tune(store, plan, version), first=True)


def recalibrate(store, name, **how):
    """Do as `RecalibrationJob` does, in its order; returns what became of it. Whoever ends, though by an error, says so."""
    lease = leases.Lease(store, lambda: store.objects.now())
    store.counter["sign"] = layout.lease_key(lease.job)
    try:
        return _recalibrate(store, lease, name, **how)
    finally:
        if not store.counter["dead"]:
            lease.end()


def _recalibrate(store, lease, name, *, better=True, keep=2, chosen="last:2", drop=None):
    plan, before = ownership.read_plan(store), store.read(layout.CURRENT)
    current = pointer.read_current(store)
    if recalibrations.take(store, lease, wait=store.wait) is not None:
        return "busy"
    left_out, there = pointer.left_out(current), windows_of(store, plan)
    if drop is None:
        number = max(window.plan.window_number for window in there) + 1
        known = {window.name: window.plan for window in there}
        place = place_of(store, plan, name)
        own = lifecycle.open_window(place, known.get(name) or plan_of(name, number, plan.run_id))
        sum_window(place, own)
        place.delete_tree("partials")
    else:
        left_out = [*(one for one in left_out if one != drop), drop]
    there = windows_of(store, plan)
    staying = [window for window in there if window.name not in left_out] if is_rule(chosen) else there
    version = combine(store, plan, terms_of(choose(staying, chosen, 1.0)))
    tuning = tune(store, plan, version)
    if better:
        if not recalibrations.holds(store, lease.job):
            return "taken over"
        if not pointer.promote(store, plan, before, version, tuning, f"by {name}", left_out=left_out):
            return "lost"
    sides = [{"version": version, "tuning": tuning}, {name: current[name] for name in ("version", "tuning")}]
    retention.collect(store, plan, lease.job, keep=keep, sides=sides, chosen=chosen)
    return "promoted" if better else "kept"


def expected(windows_and_weights):
    """Return the factors of a weighted sum of windows, without store, crash or jobs."""
    total = {name: 0.0 for name in ("w/A", "b")}
    for window, weight in windows_and_weights:
        for name in total:
            total[name] = total[name] + weight * sums_of(window)[name].numpy().astype(np.float64)
    return total


def read_all(objects):
    """Read what a reader can: the current version must be whole, be what the history says, and be the sum that it claims.

    Whatever the history says is there must be there, with its windows and its tuning.
    """
    store = Memory(objects)
    plan, current = ownership.read_plan(store), pointer.read_current(store)
    history = pointer.history_of(current)
    assert (history[-1]["version"], history[-1]["tuning"]) == (current["version"], current["tuning"])
    live = [entry for entry in history if not entry.get("collected")]
    assert live[-1] == history[-1], "the current version is never collected"
    for version in {entry["version"] for entry in live}:
        manifest = versions.read_version(store, plan, version)
        terms = manifest["windows"]
        wanted = expected([(term["window"], term["weight"]) for term in terms])
        for name, place in manifest["factors"].items():
            np.testing.assert_array_equal(store.read_array(place["prefix"], name, place["entry"]), wanted[name])
        for term in terms:
            place = place_of(store, plan, term["window"])
            windows.check_arrays(place, windows.read_window(place, ownership.read_plan(place)))
    for entry in live:
        tunings.read_tuning(store, entry["tuning"])
    return history
