"""Recalibrations in miniature: the real windows, versions, pointer, leases and collection, without model, data or Ray."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from crash_store import ORIGIN, SPEC, Crash

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.plan.plan import build_plan
from laplace_dist.recalibration import RecalibrationJob
from laplace_dist.run import (
    attempts,
    evaluations,
    layout,
    leases,
    lifecycle,
    ownership,
    partial_manifests,
    partials,
    pointer,
    tunings,
    versions,
    windows,
)
from laplace_dist.run.combination import Window, choose, place_of, terms_of, windows_of
from laplace_dist.run.provenance import environment
from laplace_dist.stages import drift, reduce
from laplace_dist.stages import recalibrate as stage
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
    objects.clock, objects.told = clock, []
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
    manifests = list(partial_manifests.manifests(store, plan))
    context = SimpleNamespace(store=store, plan=plan, window_of=lambda digest: Window(store, plan), device="cpu")
    for task in reduce.part_tasks(store, plan, manifests):
        task.run(context)
    return windows.commit_window(store, plan, manifests)


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
    terms = terms_of(choose(windows_of(store, plan), "all", 1.0))
    context = SimpleNamespace(store=store, plan=plan, window=Window(store, plan), device="cpu")
    receipts = [task.run(context)["factors"] for task in reduce.factor_tasks(plan, terms)]
    versions.commit_version(store, plan, terms, receipts)
    version = versions.version_of(terms)
    pointer.write_current(store, plan, version, tune(store, plan, version), first=True)


class Miniature(RecalibrationJob):
    """The real job over small windows in memory: what reads data or computes is replaced, every step and write is its own."""

    def __init__(self, store, name, *, better, keep, chosen):
        self.store, self.better = store, better
        self.wait, self.say = store.wait, lambda text: None
        given = {"model": "m:f", "data": "d:f", "checkpoint": "simulated://run", "device": "cpu", "alert_cmd": "tell"}
        given |= {"window": name or "none", "windows": chosen, "keep_versions": keep, "skip_report": True}
        self.config = Config(**given, margin_nll=0.0 if better else 1e-3)  # by which the decisions of the two differ
        self.session = SimpleNamespace(lease=leases.Lease(store, store.objects.now))
        store.counter["sign"] = layout.lease_key(self.session.lease.job)

    def current_version(self):
        return pointer.read_current(self.store)["version"]

    def begin_window(self, there):
        name = self.config.window
        number = max(window.plan.window_number for window in there) + 1
        known = {window.name: window.plan for window in there}
        place = place_of(self.store, self.plan, name)
        own = lifecycle.open_window(place, known.get(name) or plan_of(name, number, self.plan.run_id))
        return Window(place, own), name in known

    def map(self):
        pass

    def sum_window(self):
        sum_window(self.window.store, self.window.plan)
        return self.window

    def choose_prior(self, version):
        return tune(self.store, self.plan, version)

    def score(self, version, tuning):
        chosen = {"tuning": tuning, "of": self.config.window}
        key = layout.evaluation_key(version, chosen)
        if not ownership.has(self.store, self.plan, key):
            made, metrics = environment("cpu"), {"map": {"nll": 1.0}, "laplace": {"nll": 0.9}}
            shard = layout.evaluation_shard_key(key, "test", "0")
            evaluations.commit_shard(self.store, self.plan, shard, {"laplace/nll": np.zeros(2)}, made)
            evaluations.commit_evaluation(self.store, self.plan, key, chosen, {"test": ["0"]}, metrics, made)
        return key

    def tell(self, record):
        self.store.objects.told.append(record["window"])

    def _splits(self, *names):
        return {name: range(1000) for name in names}

    def _fingerprint(self, split):
        return {"sha256": f"{split} of {self.config.window}"}

    def _run(self, tasks, progress, **how):
        return [self._carried_out(task) for task in tasks]

    def _carried_out(self, task):
        if isinstance(task, stage.Compare):
            high = -1.0 if self.better else 1.0
            found = {name: {"value": high, "low": high, "high": high} for name in ("nll", "ece")}
            return {"differences": found, "environment": environment("cpu")}
        if isinstance(task, drift.MeasureDrift):
            stream = {"edges": [], "counts": [], "looks": 1, "log_capital": 0.0}
            return {
                "record": {"streams": {"nll": {"alarm": True}}},
                "streams": {"nll": stream},
                "distance": None,
                "seen": [],
            }
        if isinstance(task, drift.CompareSpectra):
            return {}
        window = self.window or Window(self.store, self.plan)
        there = {"window": window, "window_of": lambda digest: window}
        return task.run(SimpleNamespace(store=self.store, plan=self.plan, **there, device="cpu"))


def recalibrate(store, name, *, better=True, keep=2, chosen="last:2", drop=None):
    """Recalibrate in miniature; returns what became of it. Whoever ends, though by an error, says so."""
    job = Miniature(store, name, better=better, keep=keep, chosen=chosen)
    try:
        found = job.carry_out(drop)
    except SettingsError as error:
        ends = {"has taken over": "taken over", "meanwhile, so that the comparison": "lost"}
        for text, end in ends.items():
            if text in str(error):
                return end
        raise
    finally:
        if not store.counter["dead"]:
            job.session.lease.end()
    return "busy" if found is None else "promoted" if found.promoted else "kept"


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
