"""The actors' pool with a Ray that does as it is told."""

from __future__ import annotations

from types import SimpleNamespace

import dist_cases
import pytest

from laplace_dist.execution import pool
from laplace_dist.execution.timeouts import Limit
from laplace_dist.execution.pool import RESTS
from laplace_dist.execution.pool import Pool


class Died(Exception):
    pass


class Raised(Exception):
    pass


class FakeRay:
    """Results by reference: a value, or an exception to raise; what has none is not ready."""

    exceptions = SimpleNamespace(RayTaskError=Raised, RayError=Died)

    def __init__(self):
        self.results, self.killed, self.actors = {}, [], 0

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, *_):
        self.actors += 1
        name = f"actor {self.actors}"
        call = lambda what: SimpleNamespace(remote=lambda *_: f"{name} {what}")  # noqa: E731
        return SimpleNamespace(name=name, start=call("start"), run=call("run"))

    def wait(self, refs, num_returns, timeout):
        ready = [ref for ref in refs if ref in self.results][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref):
        if isinstance(self.results[ref], Exception):
            raise self.results[ref]
        return self.results[ref]

    def kill(self, actor, no_restart):
        self.killed.append(actor.name)


@pytest.fixture
def fake(monkeypatch):
    """Return a pool of two, its Ray, and the time in a list of one."""
    ray, now = FakeRay(), [1000.0]
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None))
    monkeypatch.setattr(pool, "why_it_died", str)
    monkeypatch.setitem(__import__("sys").modules, "ray", ray)
    return Pool(dist_cases.config("/nowhere"), 2, 1, 0, say=lambda text: None), ray, now


def started(fake):
    workers, ray, _ = fake
    workers.top_up(2)
    ray.results |= {"actor 1 start": 1, "actor 2 start": 2}
    assert workers.wait(1, Limit()) == [] and workers.idle == 2
    return workers


def test_what_took_too_long_fails_and_its_worker_is_ended(fake):
    workers, ray, now = started(fake), fake[1], fake[2]
    for name in "ab":
        workers.submit(SimpleNamespace(what=name))
    now[0] += 9
    ray.results["actor 1 run"] = {}
    [event] = workers.wait(1, Limit(10.0))
    assert (event.task.what, event.receipt, event.seconds) == ("b", {}, 9.0)
    now[0] += 2
    [event] = workers.wait(1, Limit(10.0))
    assert (event.task.what, ray.killed) == ("a", ["actor 2"])
    assert "it took longer than 10 s, as --segment-timeout says" in event.failure


def test_what_has_finished_is_not_late_however_long_this_process_was_suspended(fake):
    workers, ray, now = started(fake), fake[1], fake[2]
    for name in "ab":
        workers.submit(SimpleNamespace(what=name))
    now[0] += 1e6
    ray.results |= {"actor 1 run": {}, "actor 2 run": {}}
    assert [event.failure for event in workers.wait(1, Limit(10.0))] == [None, None]
    assert ray.killed == []


def test_after_a_start_that_failed_the_next_ones_wait_longer_and_longer(fake):
    workers, ray, now = fake
    rests = []
    workers.top_up(1)
    for _ in range(8):
        number = ray.actors
        ray.results[f"actor {number} start"] = Died("its node is gone")
        [event] = workers.wait(1, Limit())
        assert (event.task, event.failure) == (None, "its node is gone")
        begun = now[0]
        while ray.actors == number:
            assert workers.wait(1, Limit()) == []
            now[0] += 0.25
            workers.top_up(1)
        rests.append(now[0] - begun)
    assert rests == [RESTS[0] * 2**i for i in range(6)] + [RESTS[1]] * 2


def test_a_task_that_failed_does_not_hold_up_the_next_worker(fake):
    workers, ray, _ = started(fake), fake[1], fake[2]
    workers.submit(SimpleNamespace(what="a"))
    ray.results["actor 2 run"] = Died("gone")
    assert [event.failure for event in workers.wait(1, Limit())] == ["gone"]
    workers.top_up(2)
    assert ray.actors == 3
