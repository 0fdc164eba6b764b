"""The actors' pool with a Ray that does as it is told: who is started where, and what becomes of it."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import dist_cases
import pytest

from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution import liveness, pool
from laplace_dist.execution.failures import STARTS_PER_NODE, STARTS_WITHOUT_MEMORY
from laplace_dist.execution.liveness import COUNT_SECONDS, SECOND_LOOK
from laplace_dist.execution.pool import SPARE_SECONDS, Pool
from laplace_dist.execution.raised import Raised
from laplace_dist.execution.scaling import LOOK_SECONDS, Placement, nodes_of
from laplace_dist.execution.starts import RESTS, Starts
from laplace_dist.execution.tasks import Answer
from laplace_dist.execution.timeouts import Limit


class Died(Exception):
    pass


class Evicted(Died):
    """By Ray's monitor of its node's memory."""


class Preempted(Died):
    preempted = True


class FakeRay:
    """Results by reference: a value, or an exception to raise; what has none is not ready.

    Attributes:
        cpus: CPUs of each node that is listed as alive.
        used: Of these, the ones that somebody else has.
        silent: Nodes that are listed as alive and do not answer.
        kernel: What nodes answer that are asked for the processes that their kernels have ended: whether, and how many.
    """

    exceptions = SimpleNamespace(RayTaskError=type("Task", (Exception,), {}), RayError=Died)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    )

    def __init__(self, **cpus):
        self.cpus, self.used, self.silent = cpus, Counter(), set()
        self.kernel = {}
        self.results, self.killed, self.where, self.now = {}, [], [], 1000.0
        self._private = SimpleNamespace(state=self)
        self.hired = Counter()

    def remote(self, _):
        return SimpleNamespace(
            options=lambda scheduling_strategy, **_: SimpleNamespace(remote=lambda *_: self._actor(scheduling_strategy))
        )

    def _actor(self, node):
        self.where.append(node)
        self.hired[node] += 1
        name = f"actor {len(self.where)}"
        call = lambda what: SimpleNamespace(remote=lambda *_: f"{name} {what}")  # noqa: E731
        return SimpleNamespace(name=name, node=node, start=call("start"), run=call("run"), finish=call("finish"))

    def nodes(self):
        listed = [{"NodeID": node, "Alive": True, "Resources": {"CPU": float(n)}} for node, n in self.cpus.items()]
        return [{**node, "NodeManagerAddress": node["NodeID"], "NodeManagerPort": 1} for node in listed]

    def available_resources_per_node(self):
        return {node: {"CPU": float(n - self.used[node] - self.hired[node])} for node, n in self.cpus.items()}

    def wait(self, refs, num_returns, timeout):
        ready = [ref for ref in refs if ref in self.results][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref):
        found = self.results[ref]
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, Answer) else Answer(found)

    def kill(self, actor, no_restart):
        self.killed.append(actor.name)
        self.hired[actor.node] -= 1

    @property
    def actors(self):
        return len(self.where)

    def all_start(self):
        """Have every worker come to life."""
        self.results |= {
            f"actor {i + 1} start": {} for i in range(self.actors) if f"actor {i + 1} start" not in self.results
        }


@pytest.fixture
def fake(monkeypatch):
    """Return what makes a pool over some nodes, its Ray, and the lines that it says."""

    def make(wanted=None, elastic=False, **cpus):
        ray, said = FakeRay(**cpus), []
        clock = SimpleNamespace(monotonic=lambda: ray.now, sleep=lambda s: None)
        monkeypatch.setattr(pool, "time", clock)
        monkeypatch.setattr(pool, "why_it_died", lambda error, lost, killed: "lost" if lost else str(error))
        monkeypatch.setattr(pool, "short_of_memory", lambda error: isinstance(error, Evicted))
        monkeypatch.setattr(liveness, "short_of_memory", pool.short_of_memory)
        monkeypatch.setattr(liveness, "ask_node", lambda node: lambda: ray.kernel.get(node, (True, None)))
        monkeypatch.setitem(__import__("sys").modules, "ray", ray)
        ray.demanded = []
        demand = ray.demanded.append if elastic else None
        placement = Placement(lambda: nodes_of(ray), {"CPU": 1.0, "GPU": 0.0}, wanted, demand)
        answers = lambda address: address.partition(":")[0] not in ray.silent  # noqa: E731
        return Pool(dist_cases.config("/nowhere"), placement, said.append, answers), ray, said

    return make


def task(what):
    return SimpleNamespace(what=what)


def started(workers, ray, wanted):
    workers.top_up(wanted)
    ray.all_start()
    assert workers.wait(1, Limit()) == [] and workers.idle == wanted


def later(ray, seconds, workers, limit=None):
    """Let time pass, and return what happens."""
    ray.now += seconds
    return workers.wait(1, limit or Limit())


# ------------------------------------------------------------------ tasks


def test_what_took_too_long_fails_and_its_worker_is_ended(fake):
    workers, ray, _ = fake(only=2)
    started(workers, ray, 2)
    for name in "ab":
        workers.submit(task(name))
    ray.results["actor 1 run"] = {}
    [event] = later(ray, 9, workers, Limit(10.0))
    assert (event.task.what, event.receipt, event.seconds) == ("b", {}, 9.0)
    [event] = later(ray, 2, workers, Limit(10.0))
    assert (event.task.what, ray.killed, event.lost) == ("a", ["actor 2"], False)
    assert "it took longer than 10 s, as --segment-timeout says" in event.failure


def test_what_has_finished_is_not_late_however_long_this_process_was_suspended(fake):
    workers, ray, _ = fake(only=2)
    started(workers, ray, 2)
    for name in "ab":
        workers.submit(task(name))
    ray.results |= {"actor 1 run": {}, "actor 2 run": {}}
    assert [event.failure for event in later(ray, 1e6, workers, Limit(10.0))] == [None, None]
    assert ray.killed == []


def test_what_a_task_raises_is_sorted_and_its_worker_is_not_used_again(fake):
    workers, ray, _ = fake(a=1, b=1)
    started(workers, ray, 2)
    for name in "xy":
        workers.submit(task(name))
    ray.results |= {"actor 1 run": Raised.of(SettingsError("--x: no")), "actor 2 run": Raised.of(OSError("gone"))}
    first, second = workers.wait(1, Limit())
    assert repr(first.failure or first.refusal) in ("SettingsError('--x: no')", "'OSError: gone'")
    assert {repr(event.refusal) for event in (first, second)} == {"SettingsError('--x: no')", "None"}
    assert {event.node for event in (first, second)} == {"a", "b"}
    assert sorted(ray.killed) == ["actor 1", "actor 2"] and workers.idle == 0


def test_a_task_that_failed_goes_to_another_node_where_there_is_one(fake):
    workers, ray, _ = fake(a=1, b=1)
    started(workers, ray, 2)
    workers.submit(task("x"))
    [node] = [ray.where[int(ref.split()[1]) - 1] for ref in workers._flight]
    ray.results[next(iter(workers._flight))] = Raised.of(OSError("gone"))
    [event] = workers.wait(1, Limit())
    assert event.node == node
    later(ray, LOOK_SECONDS, workers)
    workers.top_up(2)
    ray.all_start()
    later(ray, 1, workers)
    assert workers.idle == 2 and workers._idle[-1].node == node, "the last one to start would be the next to be used"
    workers.submit(event.task)
    assert [flight.hired.node for flight in workers._flight.values()] == [{"a": "b", "b": "a"}[node]]


# ------------------------------------------------------------------ deaths


def committing(fake, **cpus):
    """Return a pool whose one worker has computed a task and commits it, and its Ray."""
    workers, ray, _ = fake(**cpus)
    started(workers, ray, 1)
    workers.submit(task("one"))
    ray.now += 400
    ray.results["actor 1 run"] = Answer(None)
    (ref,) = workers._ready(1)
    assert workers._settle(ref) == [None, None]
    del ray.results["actor 1 run"]
    assert (workers.idle, workers.busy) == (1, 1)
    return workers, ray


def test_a_commit_goes_on_beside_the_next_task_whose_answer_tells_of_it(fake):
    workers, ray = committing(fake, a=1)
    workers.submit(task("two"))
    ray.results["actor 1 run"] = Answer(None, before={"examples": 4})
    (event,) = workers.wait(1, Limit())
    assert (event.task.what, event.receipt, event.seconds) == ("one", {"examples": 4}, 400)
    assert (workers.idle, workers.busy) == (1, 1)
    ray.results["actor 1 finish"] = {"examples": 5}
    (event,) = workers.wait(1, Limit())
    assert (event.task.what, event.receipt, workers.idle, workers.busy) == ("two", {"examples": 5}, 1, 0)


def test_a_worker_without_another_task_is_asked_to_finish_and_that_is_part_of_the_tasks_time(fake):
    workers, ray = committing(fake, a=1)
    assert workers.wait(1, Limit()) == [] and (workers.idle, workers.busy) == (0, 1)
    (event,) = later(ray, 101, workers, Limit(500))
    assert (event.task.what, "took longer than 500 s" in event.failure, event.lost) == ("one", True, False)
    workers, ray = committing(fake, a=1)
    workers.wait(1, Limit())
    ray.now += 7
    ray.results["actor 1 finish"] = {}
    assert [event.seconds for event in workers.wait(1, Limit())] == [407]


def test_a_commit_that_fails_is_its_own_tasks_and_the_worker_is_not_used_again(fake):
    workers, ray = committing(fake, a=1)
    workers.submit(task("two"))
    ray.results["actor 1 run"] = Answer({"examples": 5}, before=Raised(("builtins.OSError",), "no"))
    one, two = workers.wait(1, Limit())
    assert (one.task.what, one.failure, one.lost) == ("one", "OSError: no", False)
    assert (two.task.what, two.receipt) == ("two", {"examples": 5})
    assert ray.killed == ["actor 1"] and workers.idle == 0


@pytest.mark.parametrize("how", ["dies", "hangs", "raises", "arguments"])
def test_a_commit_whose_worker_is_lost_at_the_next_task_is_done_again_without_blame(fake, how):
    workers, ray = committing(fake, a=1)
    workers.submit(task("two"))
    if how == "hangs":
        one, two = later(ray, 11, workers, Limit(10))
    else:
        ray.results["actor 1 run"] = {
            "dies": Died("gone"),
            "raises": Answer(Raised(("builtins.KeyError",), "0"), before={}),
            "arguments": ray.exceptions.RayTaskError("no module"),
        }[how]
        ray.exceptions.RayTaskError.cause = None
        found = workers.wait(1, Limit())
        one, two = found if how != "dies" else later(ray, SECOND_LOOK + 1, workers)
    assert (one.task.what, two.task.what) == ("one", "two")
    assert (one.receipt, one.lost) == (({}, False) if how == "raises" else (None, True))
    assert two.failure and not two.lost and ray.killed == ["actor 1"]


def test_a_commit_on_a_node_that_leaves_is_done_again(fake):
    workers, ray = committing(fake, a=1, b=1)
    ray.now += LOOK_SECONDS + 1
    ray.cpus = {"b": 1}
    workers._placement.look_again()
    workers._placement.refresh(ray.now)
    (event,) = [event for event in workers._leave(ray.now) if event]
    assert (event.task.what, event.lost, workers.busy) == ("one", True, 0)


def death(fake, error, kills=None, **cpus):
    """Have the worker of one task die, whose kernel had ended so many processes before; returns the pool and its Ray."""
    workers, ray, _ = fake(**cpus)
    workers.top_up(1)
    ray.results["actor 1 start"] = Answer({}, kills=kills)
    assert workers.wait(1, Limit()) == [] and workers.idle == 1
    workers.submit(task("x"))
    ray.results["actor 1 run"] = error
    return workers, ray


def test_a_death_on_a_node_that_lives_on_is_the_tasks_after_a_second_look(fake):
    workers, ray = death(fake, Died("killed"), a=1)
    assert workers.wait(1, Limit()) == [] and workers.busy == 1, "it is not known yet, and the task is not forgotten"
    [event] = later(ray, SECOND_LOOK, workers)
    assert (event.failure, event.lost, event.node, workers.busy) == ("killed", False, "", 0)


@pytest.mark.parametrize("error, lost", [(Died, False), (Evicted, False), (Evicted, True)])
def test_a_death_for_memory_is_told_apart_where_the_node_lives_on(fake, error, lost):
    workers, ray = death(fake, error("killed"), a=1)
    if lost:
        ray.silent.add("a")
    else:
        assert workers.wait(1, Limit()) == []
    [event] = later(ray, SECOND_LOOK, workers)
    assert (event.memory, event.lost) == (error is Evicted and not lost, lost)


@pytest.mark.parametrize(
    "before, after, memory", [(7, 8, True), (7, 7, False), (7, None, False), (None, 8, False), (0, 1, True)]
)
def test_a_death_is_the_kernels_where_its_count_has_risen_since_the_workers_last_answer(fake, before, after, memory):
    workers, ray = death(fake, Died("killed"), kills=before, a=1)
    ray.kernel["a"] = True, after
    assert workers.wait(1, Limit()) == []
    [event] = later(ray, SECOND_LOOK, workers)
    assert (event.memory, event.lost) == (memory, False)


def test_the_kernels_count_is_waited_for_and_no_longer_than_a_process_may_take_to_start(fake):
    workers, ray = death(fake, Died("killed"), kills=7, a=1, b=1)
    ray.kernel = {"a": (False, None), "b": (False, None)}
    assert workers.wait(1, Limit()) == [] and later(ray, SECOND_LOOK, workers) == [] and workers.busy == 1
    ray.kernel = {"a": (True, 8), "b": (True, 8)}
    [event] = later(ray, 1, workers)
    assert event.memory
    workers, ray = death(fake, Died("killed"), kills=7, a=1)
    ray.kernel["a"] = False, None
    assert workers.wait(1, Limit()) == []
    [event] = later(ray, SECOND_LOOK + COUNT_SECONDS, workers)
    assert not event.memory


def test_a_lost_node_is_no_matter_of_memory_whatever_its_kernel_has_counted(fake):
    workers, ray = death(fake, Died("killed"), kills=7, a=1)
    ray.kernel["a"] = True, 8
    ray.silent.add("a")
    [event] = later(ray, SECOND_LOOK, workers)
    assert (event.memory, event.lost) == (False, True)


def test_a_worker_keeps_its_kernels_count_from_answer_to_answer(fake):
    """Also where it commits one task while it is at the next: what another worker was killed for before is not its own."""
    workers, ray, _ = fake(only=1)
    started(workers, ray, 1)
    ray.kernel["only"] = True, 9
    workers.submit(task("a"))
    ray.results["actor 1 run"] = Answer(None, kills=9)
    assert workers.wait(1, Limit()) == []
    workers.submit(task("b"))
    ray.results["actor 1 run"] = Died("killed")
    assert workers.wait(1, Limit()) == []
    lost, event = later(ray, SECOND_LOOK, workers)
    assert (lost.lost, event.task.what, event.memory) == (True, "b", False)


@pytest.mark.parametrize("how", ["the list says so", "it does not answer", "Ray's own word", "a moment later"])
def test_a_death_with_its_node_is_told_apart(fake, how):
    workers, ray = death(fake, Preempted("killed") if how == "Ray's own word" else Died("killed"), a=1, b=1)
    [node] = ray.where
    if how == "a moment later":
        assert workers.wait(1, Limit()) == []
    if how in ("the list says so", "a moment later"):
        del ray.cpus[node]
    elif how == "it does not answer":
        ray.silent.add(node)
    [event] = later(ray, 0.5, workers)
    assert (event.failure, event.lost) == ("lost", True)


def test_the_place_of_a_worker_that_died_is_filled_while_its_death_is_looked_into(fake):
    workers, ray = death(fake, Died("killed"), a=1, b=1)
    assert workers.wait(1, Limit()) == []
    workers.top_up(1)
    assert len(set(ray.where)) == 2, "on the other node, since this one may be going away"


def test_a_node_that_answers_is_told_from_one_that_does_not():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert liveness.node_answers(address)
    assert not liveness.node_answers(address)


# ------------------------------------------------------------------ starts


def test_after_a_start_that_failed_the_next_ones_wait_longer_and_longer_until_the_node_is_left_out(fake):
    workers, ray, said = fake(a=1)
    rests = []
    workers.top_up(1)
    for i in range(STARTS_PER_NODE):
        ray.results[f"actor {ray.actors} start"] = Raised.of(ImportError("no module x"))
        events = workers.wait(1, Limit())
        if i == STARTS_PER_NODE - 1:
            break
        assert events == []
        begun, number = ray.now, ray.actors
        while ray.actors == number:
            assert later(ray, 0.25, workers) == []
            workers.top_up(1)
        rests.append(ray.now - begun)
    assert rests == [RESTS[0], 2 * RESTS[0], 4 * RESTS[0]]
    [event] = events
    assert isinstance(event.refusal, RunFailed) and event.task is None
    assert str(event.refusal).startswith("starting a worker fails on the only node, the last time because ImportError")
    assert len(said) == STARTS_PER_NODE - 1 and all("could not start on node a (a)" in line for line in said)


def test_starts_that_fail_together_count_once(fake):
    workers, ray, _ = fake(a=8)
    workers.top_up(8)
    ray.results |= {f"actor {i + 1} start": Raised.of(OSError("no memory")) for i in range(8)}
    assert workers.wait(1, Limit()) == []
    later(ray, 3, workers)
    workers.top_up(1)
    ray.all_start()
    assert later(ray, 1, workers) == [] and workers.idle == 1


def test_one_node_on_which_no_worker_starts_is_left_out_and_the_run_goes_on(fake):
    workers, ray, said = fake(bad=1, good=1, better=1)
    for _ in range(40):
        workers.top_up(3)
        for i, node in enumerate(ray.where):
            outcome = Raised.of(ImportError("libcudnn")) if node == "bad" else {}
            ray.results.setdefault(f"actor {i + 1} start", outcome)
        assert later(ray, 1, workers) == []
    assert Counter(ray.where) == {"bad": STARTS_PER_NODE, "good": 1, "better": 1}
    assert workers.idle == 2
    [line] = [line for line in said if "left out" in line]
    assert line.startswith("node bad (bad) is left out, since workers do not start there (ImportError: libcudnn")


@pytest.mark.parametrize("nodes", [1, 3])
def test_what_the_settings_refuse_on_most_nodes_is_refused(fake, nodes):
    workers, ray, _ = fake(**{f"n{i}": 1 for i in range(nodes)})
    events = []
    for _ in range(5):
        workers.top_up(nodes)
        ray.results |= {f"actor {i + 1} start": Raised.of(SettingsError("no GPU")) for i in range(ray.actors)}
        events += later(ray, 1, workers)
    assert repr(events[0].refusal) == "SettingsError('no GPU')"
    assert ray.actors == nodes, "it would be the same at the next start"


def test_starts_that_are_lost_with_their_nodes_do_not_count(fake):
    workers, ray, said = fake(n0=1)
    for i in range(20):
        workers.top_up(1)
        ray.results[f"actor {i + 1} start"] = Died("its node died")
        ray.cpus = {f"n{i + 1}": 1}
        assert later(ray, LOOK_SECONDS, workers) == []
    assert ray.actors == 20 and not any("could not start" in line for line in said)


# ------------------------------------------------------------------ the cluster changes


def test_the_pool_follows_the_cluster(fake):
    """Started on eight CPUs, joined by 92 nodes of one: it uses them within 30 s."""
    workers, ray, _ = fake(head=8)
    started(workers, ray, 8)
    assert workers.size == 8
    ray.cpus |= {f"n{i}": 1 for i in range(92)}
    begun = ray.now
    while workers.idle < 100:
        later(ray, 1, workers)
        workers.top_up(1000)
        ray.all_start()
        assert ray.now - begun <= 30
    assert workers.size == 100 and ray.actors == 100


def test_nodes_that_leave_shrink_the_pool_and_their_idle_workers_are_not_used(fake):
    workers, ray, _ = fake(a=1, b=1, c=1)
    started(workers, ray, 3)
    del ray.cpus["a"], ray.cpus["b"]
    assert later(ray, LOOK_SECONDS, workers) == []
    assert workers.size == 1 and [hired.node for hired in workers._idle] == ["c"]


def test_without_room_it_waits_and_says_so(fake):
    workers, ray, said = fake(head=0)
    workers.top_up(5)
    for _ in range(20):
        assert later(ray, 1, workers) == []
    assert ray.actors == 0 and workers.size == 1
    assert said == [
        "waiting for room for a worker: a worker needs 1 CPU and 0 GPU on one node; the cluster has 1 node(s), room for "
        "0 worker(s) in all, and 0 CPU and 0 GPU free now"
    ]
    ray.cpus["a"] = 4
    later(ray, LOOK_SECONDS, workers)
    workers.top_up(5)
    assert ray.where == ["a"] * 4


def test_what_others_have_taken_is_left_to_them(fake):
    workers, ray, _ = fake(a=4, b=4)
    ray.used["a"] = 3
    later(ray, LOOK_SECONDS, workers)
    workers.top_up(8)
    assert Counter(ray.where) == {"a": 1, "b": 4}


def test_an_autoscaler_is_asked_for_twice_what_there_is_and_no_more_than_there_is_to_do(fake):
    """Ray says nothing of an autoscaler's limits, so it is asked again as nodes join, and stops by itself."""
    workers, ray, _ = fake(elastic=True, head=0)
    workers.top_up(100)
    workers.top_up(100)
    assert ray.actors == 0 and ray.demanded == [16] and workers.size == 16
    ray.cpus |= {str(i): 1 for i in range(16)}
    later(ray, LOOK_SECONDS, workers)
    workers.top_up(100)
    assert ray.actors == 16 and ray.demanded == [16, 32]
    ray.cpus |= {str(i): 1 for i in range(16, 32)}
    later(ray, LOOK_SECONDS, workers)
    workers.top_up(40)
    assert ray.actors == 32 and ray.demanded == [16, 32, 40]
    workers, ray, _ = fake(wanted=7, elastic=True, a=2)
    workers.top_up(5)
    workers.top_up(9)
    assert workers.size == 7 and ray.actors == 2 and ray.demanded == [5, 7]


def test_room_that_is_not_needed_any_more_is_let_go(fake):
    workers, ray, _ = fake(elastic=True, a=8)
    workers.top_up(12)
    assert ray.demanded == [12]
    for wanted in (11, 7, 6, 5, 3, 2, 1):
        workers.top_up(wanted)
    assert ray.demanded == [12, 6, 3, 1]
    workers.top_up(10)
    assert ray.demanded == [12, 6, 3, 1, 10], "the next stage needs more again"


@pytest.mark.parametrize(("elastic", "left"), [(True, 0), (False, 3)])
def test_workers_without_a_task_are_ended_where_their_nodes_can_be_given_back(fake, elastic, left):
    workers, ray, _ = fake(elastic=elastic, a=3)
    started(workers, ray, 3)
    assert later(ray, SPARE_SECONDS - 1, workers) == [] and workers.idle == 3
    assert later(ray, 2, workers) == [] and workers.idle == left == 3 - len(ray.killed)


def test_what_fits_is_counted_per_node():
    nodes = [
        {"NodeID": name, "Alive": True, "Resources": has, "NodeManagerAddress": "", "NodeManagerPort": 0}
        for name, has in {"a": {"CPU": 3, "GPU": 1}, "b": {"CPU": 3}, "c": {"CPU": 1, "GPU": 4}}.items()
    ]
    ray = SimpleNamespace(nodes=lambda: nodes, _private=SimpleNamespace(state=FakeRay()))
    for need, fits in [({"CPU": 2.0, "GPU": 0.0}, 2), ({"CPU": 1.0, "GPU": 0.5}, 3), ({"CPU": 4.0, "GPU": 0.0}, 0)]:
        placement = Placement(lambda: nodes_of(ray), need)
        placement.refresh(time.monotonic())
        assert placement.fits == fits, need


def test_a_node_without_memory_is_given_longer_than_one_on_which_starts_fail():
    """Other programs may give it back; at 12 starts, over two minutes, it is left out all the same."""
    starts, now = Starts(), 0.0
    for count in range(1, STARTS_WITHOUT_MEMORY + 1):
        out = starts.failed("n", "low on memory", begun=now, now=now + 0.1, memory=True)
        assert out == (count == STARTS_WITHOUT_MEMORY)
        now += 20
    assert not Starts().failed("n", "x", begun=0, now=1) and STARTS_WITHOUT_MEMORY > 2 * STARTS_PER_NODE
