"""Dying at every single operation of a run: nothing half-readable in between, and the same bytes after recovery."""

from __future__ import annotations

import re
import shutil
import uuid
from collections import Counter

import pytest
from crash_store import ORIGIN, Crash, CrashingStore, finish, make_plan, serial, start, state, sums_of, whole_run, work
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import laplace_dist
from laplace_dist.run import attempts, layout, lifecycle, partial_manifests, partials, place
from laplace_dist.run.checkpoint import Checkpoint

PLAN = make_plan()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the operations of a run to which nothing happens, and the state that it ends in."""
    store = CrashingStore(str(tmp_path_factory.mktemp("undisturbed") / "run"))
    whole_run(store, PLAN)
    return store.operations, state(Checkpoint(store.url), PLAN)


def damage(url):
    """Return the problems that a verification finds, apart from the weights, which are a stand-in here."""
    problems = laplace_dist.verify(url).problems if Checkpoint(url).exists(layout.PLAN) else []
    return [text for key, text in problems if key != layout.WEIGHTS]


def committed(url):
    """Return the ids of the segments that have a manifest."""
    keys = Checkpoint(url).list("partials", recursive=False)
    return {key.split("/")[1].removesuffix(".json") for key in keys if key.endswith(".json")}


def worked_on(operations):
    """Return the ids of the segments for which something was written or deleted."""
    pattern = re.compile(r"(?:create|put|replace|delete|flush) partials/([^/.]+)")
    return {match[1] for match in map(pattern.match, operations) if match}


def test_the_miniature_run_is_the_serial_sum(undisturbed):
    operations, end = undisturbed
    expected = serial(PLAN)
    assert {name: end["current"][name] for name in expected["current"]} == expected["current"]
    assert {id_: end[id_] for id_ in expected if id_ != "current"} == {
        i: p for i, p in expected.items() if i != "current"
    }
    kinds = Counter(operation.split()[0] for operation in operations)
    assert min(kinds[name] for name in ("create", "put", "replace", "flush", "read", "list", "exists", "delete")) > 0


# Dying after an operation is dying before the next one, so these two are all there is.
@pytest.mark.parametrize("when", ["before", "middle"])
def test_a_crash_at_any_operation_leaves_the_last_committed_state(undisturbed, tmp_path, when):
    """Of plan, commit, reduce and promote; the second attempt may die too, at the same place."""
    operations, end = undisturbed
    fatal = range(1, len(operations) + 1)
    if when == "middle":  # only these are not atomic
        fatal = [at for at in fatal if operations[at - 1].split()[0] in ("put", "delete")]
    assert len(fatal) > 15
    for at in fatal:
        url = str(tmp_path / f"{at}")
        with pytest.raises(Crash):
            whole_run(CrashingStore(url, at, when), PLAN)
        seen = state(Checkpoint(url), PLAN)
        assert all(end[name] == value for name, value in seen.items()), operations[at - 1]
        assert damage(url) == [], operations[at - 1]
        if at % 7 == 0:
            with pytest.raises(Crash):
                whole_run(CrashingStore(url, 5, when), PLAN)
        before = committed(url)
        again = CrashingStore(url)
        whole_run(again, PLAN)
        assert state(Checkpoint(url), PLAN) == end, operations[at - 1]
        assert worked_on(again.operations) == {segment.id for segment in PLAN.segments} - before, operations[at - 1]
        shutil.rmtree(url)


@pytest.mark.parametrize("when", ["before", "middle"])
def test_a_crash_while_a_run_is_deleted_leaves_a_run_that_can_go_on(undisturbed, tmp_path, when):
    """Deleting goes from what refers to what is referred to, so that nothing refers to what is gone."""
    _, end = undisturbed
    finished = tmp_path / "finished"
    whole_run(Checkpoint(str(finished)), PLAN)
    probe = CrashingStore(str(shutil.copytree(finished, tmp_path / "probe")))
    place.clear(probe)
    assert len(probe.operations) > 10
    for at in range(1, len(probe.operations) + 1):
        url = str(shutil.copytree(finished, tmp_path / f"{at}"))
        with pytest.raises(Crash):
            place.clear(CrashingStore(url, at, when))
        store = Checkpoint(url)
        plan = lifecycle.read_plan(store) if store.exists(layout.PLAN) else PLAN
        seen = state(store, plan)
        assert all(end[name] == value for name, value in seen.items()), probe.operations[at - 1]
        assert plan == PLAN or not seen.keys() & end.keys() - {"weights"}, "the run is nobody's any more"
        whole_run(store, PLAN)
        assert state(store, plan) == end, probe.operations[at - 1]
        shutil.rmtree(url)


# ------------------------------------------------------------------ any interleaving


class Interleavings(RuleBasedStateMachine):
    """Any number of drivers and workers over one checkpoint, each of which may die, repeat or come late."""

    folder = None
    end: dict = {}

    @initialize()
    def begin(self):
        self.url = f"{self.folder}/{uuid.uuid4().hex}"
        self.store, self.committed, self.started = Checkpoint(self.url), {}, False

    def doing(self, at, when, call):
        """Do something with a store that dies at its `at`-th operation; returns whether it survived."""
        try:
            call(CrashingStore(self.url, at, when))
        except Crash:
            return False
        return True

    crashes = {"at": st.sampled_from([0, 0, *range(1, 30)]), "when": st.sampled_from(["before", "middle", "after"])}

    @rule(**crashes)
    def start_or_resume(self, at, when):
        self.started |= self.doing(at, when, lambda store: start(store, PLAN))

    @precondition(lambda self: self.started)
    @rule(segment=st.sampled_from(PLAN.segments), **crashes)
    def run_segment(self, segment, at, when):
        """In any order, and again where it is done already."""
        self.doing(at, when, lambda store: work(store, PLAN, segment))

    @precondition(lambda self: self.started)
    @rule(first=st.sampled_from(PLAN.segments), second=st.sampled_from(PLAN.segments))
    def run_two_at_once(self, first, second):
        """The second attempt commits between the first one's arrays and its manifest."""
        url = self.url

        class Late(Checkpoint):
            def create(self, key, data):
                work(Checkpoint(url), PLAN, second)
                return super().create(key, data)

        receipt = partials.commit_partial(Late(url), PLAN, first, sums_of(first), 4, attempts.new_attempt(), **ORIGIN)
        assert receipt.attempt == partial_manifests.read_manifest(self.store, PLAN, first)["attempt"]
        assert not (receipt.won and first == second)

    @precondition(lambda self: self.started and len(self.committed) == len(PLAN.segments))
    @rule(**crashes)
    def reduce_and_promote(self, at, when):
        self.doing(at, when, lambda store: finish(store, PLAN))

    @precondition(lambda self: self.started)
    @rule()
    def collect_orphans(self):
        """Nobody is at work between two rules, so everything unnamed may go."""
        laplace_dist.verify(self.url, collect_orphans_older_than=0)

    @invariant()
    def what_is_readable_is_serial_and_stays(self):
        seen = state(self.store, PLAN)
        assert all(self.end[name] == value for name, value in seen.items())
        keys = [key for key in self.store.list("partials", recursive=False) if key.endswith(".json")]
        now = {key: self.store.read(key) for key in keys}
        assert now.items() >= self.committed.items(), "a committed segment was taken back or done again"
        self.committed = now

    def teardown(self):
        if hasattr(self, "store"):
            whole_run(self.store, PLAN)
            assert state(self.store, PLAN) == self.end
            assert damage(self.url) == []
            shutil.rmtree(self.url)


def test_any_interleaving_equals_serial(undisturbed, tmp_path):
    from hypothesis.stateful import run_state_machine_as_test

    Interleavings.folder, Interleavings.end = tmp_path, undisturbed[1]
    chosen = settings(
        max_examples=25, stateful_step_count=15, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Interleavings, settings=chosen)
