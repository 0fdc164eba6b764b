"""The loop alone, with a pool that does as it is told."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, replace

import pytest

from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.execution.timeouts import ENOUGH
from laplace_dist.execution.timeouts import FLOOR_SECONDS
from laplace_dist.execution.timeouts import TIMES
from laplace_dist.execution.timeouts import Limit
from laplace_dist.execution.timeouts import measured_limit
from laplace_dist.execution.failures import SET_ASIDE
from laplace_dist.execution.failures import START_FAILURES
from laplace_dist.execution.tasks import Event
from laplace_dist.execution.loop import run_tasks


@dataclass(frozen=True)
class Named:
    what: str


class Script:
    """A pool that answers each attempt with what `answer(task, attempt)` returns: None, a failure, or an error."""

    def __init__(self, answer=lambda task, attempt: None, size=2):
        self.size, self.answer = size, answer
        self.idle, self.alive, self.started = 0, 0, 0
        self.flight, self.attempts, self.most = deque(), Counter(), 0

    @property
    def busy(self):
        return len(self.flight)

    def top_up(self, wanted):
        new = max(0, min(wanted, self.size) - self.alive)
        self.idle, self.alive, self.started = self.idle + new, self.alive + new, self.started + new

    def submit(self, task):
        assert self.idle > 0, "one task in flight per worker"
        self.idle -= 1
        self.flight.append(task)
        self.most = max(self.most, len(self.flight))

    def wait(self, seconds, limit):
        task = self.flight.pop()  # the last first: the order of finishing is not the order of the plan
        self.attempts[task.what] += 1
        answer = self.answer(task, self.attempts[task.what])
        if answer is None:
            self.idle += 1
            return [Event(task, receipt={"of": task.what})]
        self.alive -= 1
        return [Event(task, failure=answer) if isinstance(answer, str) else Event(task, refusal=answer)]


def tasks(n):
    return [Named(f"task {i}") for i in range(n)]


def run(pool, todo, **options):
    done = options.pop("done", [])
    run_tasks(pool, todo, lambda task, receipt: done.append((task.what, receipt["of"])), **options)
    return done


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_task_is_done_once_when_nothing_fails(size):
    pool = Script(size=size)
    done = run(pool, tasks(7))
    assert sorted(done) == [(f"task {i}", f"task {i}") for i in range(7)]
    assert pool.most <= size
    assert set(pool.attempts.values()) == {1}


def test_no_more_workers_are_started_than_there_are_tasks():
    pool = Script(size=9)
    run(pool, tasks(2))
    assert pool.started == 2


def test_nothing_is_started_for_no_tasks():
    pool = Script()
    assert run(pool, []) == []
    assert pool.started == 0


def test_tasks_are_drawn_only_as_workers_become_free():
    drawn = []
    pool = Script(size=2)

    def generate():
        for i, task in enumerate(tasks(50)):
            drawn.append(i)
            yield task

    run_tasks(pool, generate(), lambda task, receipt: drawn.append("done"))
    held = [drawn[:i].count("done") for i, entry in enumerate(drawn) if entry == 49]
    assert held[0] >= 50 - 2 * pool.size - 1


def test_a_failed_task_is_done_again_by_another_worker():
    pool = Script(lambda task, attempt: "gone" if task.what == "task 3" and attempt < 3 else None)
    assert len(run(pool, tasks(6))) == 6
    assert pool.attempts["task 3"] == 3
    assert pool.started == pool.size + 2


def test_a_task_that_fails_three_times_is_set_aside_and_fails_the_run_after_the_others():
    pool, done, said = Script(lambda task, attempt: "it hurts" if task.what == "task 1" else None), [], []
    with pytest.raises(
        RunFailed, match=r"^task 1 failed 3 times, the last time because it hurts\. .*same command again"
    ):
        run(pool, tasks(40), done=done, say=said.append)
    assert pool.attempts["task 1"] == 3
    assert {what for what, _ in done} == {f"task {i}" for i in range(40)} - {"task 1"}
    assert said == ["task 1: it hurts; it is done again"] * 2 + [
        "task 1: it hurts; it is set aside, and the others go on"
    ]


def test_failures_that_differ_only_in_numbers_and_ids_are_the_same():
    pool = Script(lambda task, attempt: f"partials/000001/{attempt}ab{'c' * attempt}/w: no answer in {attempt} s")
    with pytest.raises(RunFailed, match="task 0 failed 3 times"):
        run(pool, tasks(1))


def test_different_failures_of_one_task_end_too():
    reasons = ["red", "green", "blue"]
    pool = Script(lambda task, attempt: reasons[attempt % 3] if task.what == "task 0" else None, size=1)
    with pytest.raises(RunFailed, match="task 0 failed 6 times, the last time because red"):
        run(pool, tasks(30))
    assert pool.attempts["task 0"] == 6


def test_many_bad_tasks_stop_the_run_before_all_of_them_were_tried():
    """Every other one is bad, so that successes lie in between."""
    pool, done = Script(lambda task, attempt: "bad" if int(task.what[5:]) % 2 else None, size=1), []
    with pytest.raises(RunFailed) as caught:
        run(pool, tasks(1000), done=done)
    bad = [
        line for line in str(caught.value).splitlines() if line.endswith(" failed 3 times, the last time because bad.")
    ]
    assert len(bad) == SET_ASIDE
    assert len(done) < 4 * SET_ASIDE


def test_failures_all_over_the_place_stop_the_run():
    pool = Script(lambda task, attempt: "bad" * attempt, size=40)
    with pytest.raises(RunFailed, match="120 failures in a row"):
        run(pool, tasks(1000))


def test_many_failures_with_progress_in_between_do_not_stop_the_run():
    pool = Script(lambda task, attempt: "preempted" if attempt == 1 else None, size=1)
    assert len(run(pool, tasks(40))) == 40


@pytest.mark.parametrize("error", [SettingsError("--x: no"), CheckpointError("a/b is altered"), RunFailed("disk full")])
def test_an_error_that_would_come_again_stops_the_run_as_it_is(error):
    pool = Script(lambda task, attempt: error if task.what == "task 0" else None)
    with pytest.raises(type(error)) as caught:
        run(pool, tasks(3))
    assert caught.value is error
    assert pool.attempts["task 0"] == 1


def test_an_error_of_the_core_library_gets_the_name_of_the_task():
    pool = Script(lambda task, attempt: ValueError("labels run to 9, but there are 3 outputs"))
    with pytest.raises(RunFailed, match=r"task \d: labels run to 9"):
        run(pool, tasks(1))


def test_workers_that_cannot_start_stop_the_run():
    class Broken(Script):
        def top_up(self, wanted):
            self.started += 1

        def wait(self, seconds, limit):
            return [Event(None, failure="ImportError: no such module")]

    with pytest.raises(RunFailed, match="starting a worker failed 8 times.*no such module"):
        run(Broken(), tasks(2))


def test_starts_that_fail_now_and_then_do_not_stop_a_run():
    """On machines that come and go, over a long run."""

    class Flapping(Script):
        def wait(self, seconds, limit):
            return [*super().wait(seconds, limit), *[Event(None, failure="its node died")] * (START_FAILURES - 1)]

    assert len(run(Flapping(size=4), tasks(40))) == 40


# ------------------------------------------------------------------ the time-out of a task


def test_the_limit_is_a_multiple_of_the_slowest_with_a_floor():
    assert measured_limit(ENOUGH - 1, 1000.0) is None, "too few to tell"
    assert measured_limit(ENOUGH, 1e-3) == FLOOR_SECONDS >= 60
    assert measured_limit(ENOUGH, FLOOR_SECONDS) == TIMES * FLOOR_SECONDS


def test_a_limit_follows_the_tasks():
    limit = Limit()
    assert limit.seconds is None
    for seconds in (100.0, 200.0, 1.0):
        limit.finished(seconds)
    assert limit.seconds == 2000.0
    assert str(limit) == "2000 s, 10 times the slowest so far and at least 300 s; --segment-timeout sets another"
    limit.finished(300.0)
    assert limit.seconds == 3000.0


def test_a_given_limit_stays():
    limit = Limit(8.0)
    assert str(limit) == "8 s, as --segment-timeout says"
    for _ in range(5):
        limit.finished(100.0)
    assert limit.seconds == 8.0


def test_the_pool_gets_a_limit_from_the_times_that_it_reports():
    class Timed(Script):
        limits = []

        def wait(self, seconds, limit):
            self.limits.append(limit.seconds)
            [event] = super().wait(seconds, limit)
            return [replace(event, seconds=100.0)]

    run(Timed(size=1), tasks(5), limit=Limit())
    assert Timed.limits == [None, None, None, 1000.0, 1000.0]
    Timed.limits.clear()
    run(Timed(size=1), tasks(2))
    assert Timed.limits == [float("inf")] * 2, "stages whose tasks are not alike have none"
