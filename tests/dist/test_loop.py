"""The loop alone, with a pool that does as it is told."""

from __future__ import annotations

import pickle
import sys
import types
from collections import Counter, deque
from dataclasses import dataclass, replace

import pytest
import torch

from laplace_dist.config.import_path import call
from laplace_dist.errors import (
    CallFailed,
    CheckpointError,
    ExampleError,
    MissingObjectError,
    RunFailed,
    SettingsError,
    StorageError,
)
from laplace_dist.execution.failures import SET_ASIDE, Verdict, event_of, verdict
from laplace_dist.execution.loop import run_tasks
from laplace_dist.execution.raised import Raised
from laplace_dist.execution.tasks import Event
from laplace_dist.execution.timeouts import ENOUGH, FLOOR_SECONDS, TIMES, Limit, measured_limit
from laplace_dist.testing.simulated_pool import SimulatedPool


@dataclass(frozen=True)
class Named:
    what: str


class Script:
    """A pool that answers each attempt with what `answer(task, attempt)` returns: None, a failure, an error, or an event."""

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
        if isinstance(answer, Event):
            return [answer]
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


def test_what_concerns_all_tasks_stops_the_run_as_it_is():
    class Broken(Script):
        def wait(self, seconds, limit):
            return [Event(None, refusal=RunFailed("no worker starts"))]

    with pytest.raises(RunFailed, match="^no worker starts$"):
        run(Broken(), tasks(2))


def test_a_pool_that_has_no_room_yet_is_waited_for():
    class Empty(Script):
        rounds = 0

        def wait(self, seconds, limit):
            if not self.flight:
                self.rounds, self.size = self.rounds + 1, 1
                return []
            return super().wait(seconds, limit)

    pool = Empty(size=0)
    assert len(run(pool, tasks(3))) == 3
    assert pool.rounds == 1


def test_the_tick_says_how_many_are_at_work_and_on_what():
    seen = []
    run(Script(size=1), tasks(2), tick=lambda busy, oldest: seen.append((busy, oldest)))
    assert seen == [(0, ""), (0, "")]
    seen.clear()
    run(Script(size=2), tasks(2), tick=lambda busy, oldest: seen.append((busy, oldest)))
    assert seen[0] == (1, "task 0"), "the one that finished was task 1"


# ------------------------------------------------------------------ machines that are preempted


@pytest.mark.parametrize("p", [0.02, 0.1, 0.3])
def test_preempted_attempts_cost_the_time_that_was_lost_and_no_more(p):
    """100 workers, 4,096 segments, 20 seeds: all finish, in at most 1.1 times the ideal time."""
    for seed in range(20):
        pool, done = SimulatedPool(100, p, seed), []
        run_tasks(pool, tasks(4096), lambda task, receipt, done=done: done.append(task.what))
        assert len(done) == len(set(done)) == 4096
        assert pool.now <= 1.1 * pool.ideal
        assert pool.attempts.total() > 4096 * (1 + p / 2), "so many were preempted"


def test_a_poisoned_segment_is_set_aside_after_three_failures_on_living_nodes():
    """Beside preemptions, which are not counted against it."""
    pool, done = SimulatedPool(10, 0.3, seed=1, poisoned=["task 7", "task 300"]), []
    with pytest.raises(RunFailed, match="task 7 failed 3 times.*\ntask 300 failed 3 times"):
        run_tasks(pool, tasks(400), lambda task, receipt: done.append(task.what))
    assert len(done) == 398
    assert pool.attempts["task 7"] == pool.attempts["task 300"] == 3


def test_losses_are_endless_only_while_something_finishes():
    pool = SimulatedPool(5, preempted=1.0)
    with pytest.raises(
        RunFailed,
        match="100 nodes were lost with nothing finished in between.*--segment-size.*OOMKilled.*--num-workers",
    ):
        run_tasks(pool, tasks(50), lambda task, receipt: None)


def test_losses_before_the_failures_of_a_task_are_not_counted_with_them():
    def answer(task, attempt):
        lost = task.what == "task 1" and attempt <= 20
        return Event(task, failure="its node was lost", lost=True) if lost else "bad" if task.what == "task 1" else None

    pool = Script(answer)
    with pytest.raises(RunFailed, match="task 1 failed 3 times, the last time because bad"):
        run(pool, tasks(40))
    assert pool.attempts["task 1"] == 23


# ------------------------------------------------------------------ errors that would come again


def raising(error, bad=("task 1",), nodes=("",)):
    """Return an answer: these tasks raise, on one node after the other."""

    def answer(task, attempt):
        return event_of(task, Raised.of(error), nodes[(attempt - 1) % len(nodes)]) if task.what in bad else None

    return answer


SHAPES = RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x27 and 28x3)")


def test_an_error_that_two_tasks_share_stops_a_run_in_which_nothing_has_finished():
    pool = Script(raising(SHAPES, [f"task {i}" for i in range(50)]), size=4)
    with pytest.raises(
        RunFailed, match=r"task \d: RuntimeError: mat1.*; \w+.* failed in the same way.*no use"
    ) as caught:
        run(pool, tasks(50))
    assert pool.attempts.total() == 2
    assert str(caught.value).count("\n") == 0


def test_a_task_that_is_alone_is_tried_twice():
    pool = Script(raising(SHAPES, ["task 0"]))
    with pytest.raises(RunFailed, match="task 0: RuntimeError: mat1.*it failed in the same way before"):
        run(pool, tasks(1))
    assert pool.attempts.total() == 2


def test_an_error_of_one_task_among_good_ones_sets_it_aside():
    pool = Script(raising(SHAPES, ["task 20"]))
    with pytest.raises(RunFailed, match="task 20 failed 3 times, the last time because RuntimeError: mat1"):
        run(pool, tasks(40))
    assert pool.attempts["task 20"] == 3 and pool.attempts.total() == 42


@pytest.mark.parametrize("error", [TypeError("forward() takes 2"), ImportError("no module x"), AssertionError()])
def test_an_error_of_the_code_stops_the_run_when_another_node_says_so_too(error):
    pool = Script(raising(error, ["task 5"], nodes=["a", "b"]))
    with pytest.raises(RunFailed, match=f"task 5: {type(error).__name__}.*in the same way on another node"):
        run(pool, tasks(40))
    assert pool.attempts["task 5"] == 2


def test_an_error_of_the_code_on_one_node_alone_may_be_that_nodes():
    pool = Script(
        lambda task, attempt: raising(ImportError("no x"), ["task 5"], ["a"])(task, 1) if attempt < 3 else None
    )
    assert len(run(pool, tasks(40))) == 40


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError("eigh: did not converge"), NotImplementedError("no such op")]
)
def test_an_error_of_the_numbers_stops_the_run_at_once(error):
    pool = Script(raising(error))
    with pytest.raises(RunFailed, match=f"^task 1: {type(error).__name__.lstrip('_')}: {error}"):
        run(pool, tasks(40))
    assert pool.attempts["task 1"] == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route to host"),
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        RuntimeError("CUDA error: uncorrectable ECC error"),
        StorageError("a/b: no answer"),
        ExampleError("--data: example 3 cannot be read (OSError: gone)", [3]),
    ],
)
def test_an_error_that_may_pass_is_tried_again(error):
    def answer(task, attempt):
        return raising(error, ["task 0", "task 1", "task 2"])(task, attempt) if attempt < 3 else None

    assert len(run(Script(answer, size=3), tasks(3))) == 3


def test_what_cannot_be_read_for_its_content_belongs_to_its_examples():
    error = ExampleError("--data: example 12 cannot be read (KeyError: 'label')", [12])
    error.__cause__ = KeyError("label")
    pool = Script(raising(error))
    with pytest.raises(RunFailed, match="task 1 failed 3 times"):
        run(pool, tasks(40))
    pool = Script(raising(error, [f"task {i}" for i in range(40)]))
    with pytest.raises(RunFailed, match="failed in the same way, and nothing has finished"):
        run(pool, tasks(40))
    assert pool.attempts.total() <= 3


# ------------------------------------------------------------------ errors as plain data


class Unpicklable(Exception):
    """As those whose constructor takes more than its message."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.examples = code, [3, 4]


def test_an_error_is_carried_as_plain_data():
    try:
        raise Unpicklable(7, "it hurts") from KeyError("x")
    except Unpicklable as error:
        raised = pickle.loads(pickle.dumps(Raised.of(error)))
    assert str(raised) == "Unpicklable: it hurts" and raised.examples == (3, 4)
    assert raised.is_a("builtins.Exception") and "builtins.KeyError" in raised.causes
    assert raised.trace[-1].startswith("test_loop.py:")
    assert raised.located() == f"Unpicklable: it hurts ({raised.trace[-1]}), examples 3, 4"


@pytest.mark.parametrize("kind", [SettingsError, CheckpointError, MissingObjectError, StorageError, RunFailed])
def test_an_error_of_this_project_is_rebuilt_by_name(kind):
    again = Raised.of(kind("why")).rebuilt()
    assert type(again) is kind and str(again) == "why"


def test_other_errors_are_rebuilt_with_their_type_in_the_text():
    assert repr(Raised.of(ValueError("why")).rebuilt()) == "ValueError('why')"
    assert repr(Raised.of(ZeroDivisionError("why")).rebuilt()) == "RuntimeError('ZeroDivisionError: why')"


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


# ------------------------------------------------------------------ attempts that take too long


class Clocked(Script):
    """A script on a clock: every attempt takes as long as `seconds(task, attempt)` says; ties are in the order of submission."""

    def __init__(self, seconds, size=4, answer=lambda task, attempt: None):
        super().__init__(answer, size)
        self.seconds, self.now, self.due, self.begun = seconds, 0.0, [], Counter()

    @property
    def busy(self):
        return len(self.due)

    def submit(self, task):
        assert self.idle > 0
        self.idle -= 1
        self.begun[task.what] += 1
        took = self.seconds(task, self.begun[task.what])
        self.due.append((self.now + took, len(self.due), took, task, self.begun[task.what]))
        self.due.sort(key=lambda item: item[:2])

    def wait(self, seconds, limit):
        if not self.due or self.due[0][0] > self.now + seconds:
            self.now += seconds
            return []
        self.now, _, took, task, attempt = self.due.pop(0)
        self.idle += 1
        answer = self.answer(task, attempt)
        return [
            Event(task, receipt={"attempt": attempt}, seconds=took) if answer is None else replace(answer, task=task)
        ]


def carried_out(pool, n, alike=True):
    """Return the receipts by task, and the lines that were said."""
    done, said = {}, []

    def on_done(task, receipt):
        assert task.what not in done, "a task is done once"
        done[task.what] = receipt["attempt"]

    run_tasks(pool, [Named(str(i)) for i in range(n)], on_done, say=said.append, alike=alike, clock=lambda: pool.now)
    assert len(done) == n
    return done, said


def test_an_idle_worker_begins_the_slow_one_again_and_the_run_does_not_wait_for_the_first():
    pool = Clocked(lambda task, attempt: 3000.0 if task.what == "9" and attempt == 1 else 60.0)
    done, said = carried_out(pool, 10)
    assert done == {str(i): 1 for i in range(9)} | {"9": 2}
    assert said == ["9: takes much longer than others; an idle worker does it too, and the first to finish counts"]
    assert pool.now <= 180 + 90 + 60 + 1 and pool.busy == 1  # the first attempt is still at work


def test_the_first_attempt_counts_where_it_is_first():
    pool = Clocked(lambda task, attempt: 105.0 if task.what == "9" and attempt == 1 else 60.0)
    done, said = carried_out(pool, 10)
    assert done["9"] == 1 and len(said) == 1


@pytest.mark.parametrize(
    ("seconds", "alike"),
    [(lambda what: 75.0 if what == "9" else 60.0, True), (lambda what: 9.0 if what == "9" else 1.0, True)]
    + [(lambda what: 3000.0 if what == "9" else 60.0, False)],
)
def test_what_is_a_little_slower_short_or_large_is_waited_for(seconds, alike):
    pool = Clocked(lambda task, attempt: seconds(task.what))
    assert carried_out(pool, 10, alike)[1] == [] and max(pool.begun.values()) == 1


def test_nothing_is_begun_twice_while_there_is_other_work():
    pool = Clocked(lambda task, attempt: 900.0 if task.what == "0" else 60.0)
    assert carried_out(pool, 200)[1] == []


def test_a_second_attempt_on_a_slow_node_gets_a_third_and_there_are_no_more():
    pool = Clocked(lambda task, attempt: 3000.0 if task.what == "9" and attempt < 3 else 60.0)
    assert carried_out(pool, 10)[0]["9"] == 3
    pool = Clocked(lambda task, attempt: 3000.0 if task.what == "9" else 60.0)
    assert carried_out(pool, 10)[0]["9"] == 1 and pool.begun["9"] == 3


def test_an_attempt_that_fails_beside_another_is_not_begun_again_and_counts_against_nothing():
    lost = Event(None, failure="its node was preempted", lost=True)
    pool = Clocked(
        lambda task, attempt: {1: 600.0, 2: 30.0}.get(attempt, 2999.0) if task.what == "9" else 60.0,
        answer=lambda task, attempt: lost if (task.what, attempt) == ("9", 2) else None,
    )
    done, said = carried_out(pool, 10)
    assert said[1] == "9: its node was preempted; another attempt at it goes on" and done["9"] == 1
    assert pool.begun["9"] == 4, "at once there are three"


def test_what_an_earlier_stage_left_behind_is_none_of_the_next_one_s():
    pool = Clocked(lambda task, attempt: 600.0 if task.what == "9" and attempt == 1 else 60.0)
    carried_out(pool, 10)
    assert pool.busy == 1
    more = {}
    tasks = [Named(f"next {i}") for i in range(40)]
    run_tasks(pool, tasks, lambda task, receipt: more.update({task.what: receipt}), clock=lambda: pool.now)
    assert len(more) == 40 and not pool.busy


def test_a_hundred_thousand_segments_on_a_thousand_workers_end_in_time_with_stragglers():
    """One attempt of a hundred takes ten times as long; the simulation stands for `benchmarks/simulation.py`, a tenth of it."""
    pool = SimulatedPool(100, seed=3, stragglers=0.01)
    done = Counter()
    run_tasks(
        pool,
        (Named(f"segment {i}") for i in range(10_000)),
        lambda task, receipt: done.update([task.what]),
        clock=lambda: pool.now,
    )
    assert len(done) == 10_000 and set(done.values()) == {1}
    assert pool.now <= 1.05 * pool.ideal


class ConnectError(Exception):
    """One of httpx's, as Hugging Face's hub raises them; no OSError."""


ConnectError.__module__ = "httpx"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectError("no route"), Verdict.MAY_PASS),
        (RuntimeError("no licence on this node"), Verdict.UNKNOWN),
        (ModuleNotFoundError("No module named 'x'"), Verdict.SAME_CODE),
        (ValueError("wrong"), Verdict.FINAL),
    ],
)
def test_what_a_function_of_the_user_raises_on_a_worker_counts_as_what_it_is(error, says):
    """The driver has called it and it went well: one bad node is no reason to end the run."""

    def raising():
        raise error

    sys.modules["raising"] = types.ModuleType("raising")
    sys.modules["raising"].model = raising
    try:
        with pytest.raises(CallFailed) as found:
            call("raising:model", "--model", {})
    finally:
        del sys.modules["raising"]
    assert verdict(Raised.of(found.value)) is says
