"""Whole runs under seeded schedules: drivers, workers, readers and a collector by turns, over a store that goes wrong.

`benchmarks/schedules.py` runs thousands of them, and shows one seed step by step.
"""

from __future__ import annotations

import pytest
from simulated_runs import Worker, batch
from simulation import simulate

from laplace_dist.run import lifecycle, ownership, windows
from laplace_dist.testing.schedule import Schedule
from laplace_dist.testing.simulated_store import SimulatedStore

SEEDS = 80


def test_whatever_the_schedule_the_sum_is_the_serial_one():
    outcomes = [simulate(seed) for seed in range(SEEDS)]
    assert {outcome.seed: outcome.failures for outcome in outcomes if outcome.failures} == {}
    fired = sum((outcome.fired for outcome in outcomes), start=outcomes[0].fired.__class__())
    wanted = ("driver: finished", "driver: crashed", "driver: stopped for another run", "reader: the sum", "put: twice",
              "collector: collected", "worker: taken for hung")  # fmt: skip
    assert min(fired[name] for name in wanted) > 0


def test_a_seed_is_replayed_step_by_step():
    first, again = simulate(7), simulate(7)
    assert first.trace == again.trace and first.steps > 100


def failing(seeds):
    """Return the failures of the first schedule that has some."""
    return next((found for seed in seeds if (found := simulate(seed).failures)), [])


def overwriting(self, key, data):
    self.replace(key, data)
    return True


def kept(self, sums, x, y, offset, example_weights):
    """Add a little of what this worker has seen before, as a worker does that does not begin from zero."""
    sums.tensors, sums.n_data = batch(self.plan.settings["seed"], offset), 4
    sums.tensors = {name: value + getattr(self, "before", 0.0) for name, value in sums.tensors.items()}
    self.before = 1e-6


def backwards(store, plan, manifests, part, real=windows.sum_part):
    return real(store, plan, manifests[::-1], part)


def regardless(*_):
    return False


@pytest.mark.parametrize(("broken", "seeds"), [
    ({(SimulatedStore, "create"): overwriting}, range(20)),
    ({(Worker, "_accumulate"): kept}, range(5)),
    ({(windows, "sum_part"): backwards}, range(5)),
    # in which it matters:
    ({(ownership, "is_foreign"): regardless, (lifecycle, "of_another"): regardless}, (21, 171, 346, 456)),
], ids=["a create that overwrites", "sums that a worker keeps", "another order", "a deleted run counts"])  # fmt: skip
def test_broken_code_is_found(monkeypatch, broken, seeds):
    for (owner, name), replacement in broken.items():
        monkeypatch.setattr(owner, name, replacement)
    assert failing(seeds)


def test_a_schedule_without_end_is_a_failure():
    schedule = Schedule(0, limit=100)

    def forever(actor):
        while True:
            actor.step("goes on")

    schedule.start("one", forever)
    schedule.start("another", forever)
    schedule.run()
    assert schedule.failures == ["no end after 101 steps"]
