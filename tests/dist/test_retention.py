"""Collecting what is kept for nothing: beside readers and other jobs, and killed at any operation; and a year of it."""

from __future__ import annotations

import copy

import pytest
from crash_store import Crash
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from recalibration_runs import FIRST, Memory, bucket, fit, read_all, recalibrate

from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.run import layout, ownership, pointer, recalibrations
from laplace_dist.run.combination import windows_of


def copied(objects):
    """Return a bucket like another."""
    new = bucket()
    new.data, new.times, new.clock[0], new.told = dict(objects.data), dict(objects.times), objects.clock[0], []
    return new


def kinds(objects):
    """Return which versions, tunings and windows there are."""
    keys = [key for key in objects.data if key.endswith(".json") and "/" in key]
    found = {key for key in keys if key.count("/") == 1 and key.startswith(("posteriors", "tuning"))}
    return found | {key.split("/")[1] for key in objects.data if key.startswith("windows/")}


@pytest.fixture(scope="module")
def before():
    """A run with four windows, all of whose versions are there."""
    objects = bucket()
    fit(Memory(objects))
    for name in ("w001", "w002", "w003"):
        assert recalibrate(Memory(objects), name, keep=9, chosen="all") == "promoted"
    return objects


LAST = {"name": "w004", "keep": 2, "chosen": "last:2"}


@pytest.fixture(scope="module")
def undisturbed(before):
    """The operations of a recalibration that collects much, and what it leaves."""
    objects = copied(before)
    store = Memory(objects)
    assert recalibrate(store, **LAST) == "promoted"
    return store.counter["operations"], objects


def test_a_users_files_in_folders_that_are_collected_stay(before):
    objects = copied(before)
    mine = {f"windows/{name}/{rest}": b"mine" for name in ("w001", "w002") for rest in ("notes.txt", "partials/x.txt")}
    for key, content in mine.items():
        objects.data[key], objects.times[key] = content, 0.0
    for name in ("w004", "w005", "w006"):
        assert recalibrate(Memory(objects), name, keep=1, chosen="last:1") == "promoted"
    assert not [key for key in objects.data if key.startswith("windows/w001/") and key not in mine], (
        "the rest is collected"
    )
    assert {key: objects.data.get(key) for key in mine} == mine


def test_only_what_is_needed_is_left(before, undisturbed):
    operations, objects = undisturbed
    history = read_all(objects)
    kept = [entry["version"] for entry in history if not entry.get("collected")]
    assert len(history) == 5 and len(kept) == 2 and len(kinds(before)) == 4 + 4 + 3
    wanted = {f"posteriors/{version}.json" for version in kept} | {e["tuning"] for e in history[-2:]}
    assert kinds(objects) == wanted | {"w001", "w002", "w003", "w004"}, "the version before is of all four"
    objects = copied(objects)
    assert recalibrate(Memory(objects), "w005", keep=1, chosen="last:2") == "promoted"
    assert kinds(objects) & {"w001", "w002", "w003", "w004", "w005"} == {"w004", "w005"}


@pytest.mark.parametrize("when", ["before", "middle"])  # dying after an operation is dying before the next one
def test_killed_at_any_operation_there_is_one_current_version_and_the_same_command_ends_alike(
    before, undisturbed, when
):
    operations, end = undisturbed
    fatal = range(1, len(operations) + 1)
    if when == "middle":
        fatal = [at for at in fatal if operations[at - 1].split()[0] in ("put", "delete")]
    assert len(fatal) > 20 and any("swap CURRENT" in operation for operation in operations)
    for at in fatal:
        objects = copied(before)
        with pytest.raises(Crash):
            recalibrate(Memory(objects, at, when), **LAST)
        history = read_all(objects)
        assert len(history) in (4, 5), operations[at - 1]
        late = at % 2  # the same command comes when the dead job counts as dead for collections too, or at once
        objects.clock[0] += 7200 * late
        assert recalibrate(Memory(objects), **LAST) == "promoted", operations[at - 1]
        again = read_all(objects)
        assert again[-1]["version"] == read_all(end)[-1]["version"]
        assert not late or kinds(objects) == kinds(end), operations[at - 1]
        assert len(again) == 5, f"{operations[at - 1]}: nothing is promoted twice"
        found = recalibrations.read_decision(Memory(objects), ownership.read_plan(Memory(objects)), "w004")
        assert found["promoted"] and not found.get("pending"), operations[at - 1]
        assert found["candidate"]["version"] != found["current"]["version"] and found["drift"]["noticed"]
        assert "w004" in objects.told, f"{operations[at - 1]}: whoever wakes somebody was told at least once"
        assert not late or len({e["version"] for e in again if not e.get("collected")}) <= 2


def test_a_reader_at_any_moment_has_a_whole_posterior(before, undisturbed):
    """Between every two operations; one who has read the pointer before has the old one or an error that names the object."""
    operations, _ = undisturbed
    early = pointer.history_of(pointer.read_current(Memory(before)))[0]["version"]
    gone = 0
    for at in range(1, len(operations) + 1):
        objects = copied(before)

        def look(_, objects=objects):
            read_all(objects)
            raise Crash

        with pytest.raises(Crash):
            recalibrate(Memory(objects, at, act=look), **LAST)
        store = Memory(objects)
        plan = ownership.read_plan(store)
        try:
            manifest = pointer_version(store, plan, early)
            assert all(len(value) for value in manifest.values())
        except CheckpointError as error:
            gone += 1
            assert early in str(error)
    assert gone > 3


def pointer_version(store, plan, version):
    from laplace_dist.run import versions

    manifest = versions.read_version(store, plan, version)
    return {n: store.read_array(p["prefix"], n, p["entry"]) for n, p in manifest["factors"].items()}


def test_a_rollback_at_any_moment_is_refused_or_leaves_a_whole_posterior(before, undisturbed):
    operations, _ = undisturbed
    oldest = pointer.history_of(pointer.read_current(Memory(before)))[0]["version"]
    outcomes = set()
    for at in range(1, len(operations) + 1):
        objects = copied(before)

        def back(_, objects=objects):
            store = Memory(objects)
            try:
                pointer.roll_back(store, ownership.read_plan(store), oldest)
                outcomes.add("rolled back")
            except SettingsError as error:
                outcomes.add("refused")
                assert "was collected" in str(error)

        outcomes.add(recalibrate(Memory(objects, at, act=back), **LAST))
        read_all(objects)
    assert outcomes == {"rolled back", "refused", "promoted", "lost"}


def test_a_job_that_stood_still_cannot_promote_what_was_collected_meanwhile(before):
    """Its candidate was never current, so that the history has nothing to say of it."""
    objects = copied(before)
    store = Memory(objects)
    assert recalibrate(store, "w004", better=False, keep=9, chosen="all") == "kept"
    plan, content = ownership.read_plan(store), store.read(layout.CURRENT)
    (candidate,) = {k.split("/")[1][:16] for k in kinds(objects) - kinds(before) if k.startswith("posteriors")}
    assert recalibrate(store, "w005", better=False, keep=9, chosen="all") == "kept"
    assert not store.exists(layout.version_key(candidate))
    assert not pointer.promote(store, plan, content, candidate, None, "late")
    read_all(objects)


def test_a_version_whose_arrays_another_job_has_collected_is_made_again(before, undisturbed):
    """A job that stood still commits the manifest when its arrays are gone already; the next one is not stuck there."""
    objects = copied(before)
    assert recalibrate(Memory(objects), "w004", better=False, keep=9) == "kept"
    (candidate,) = {k.split("/")[1][:16] for k in kinds(objects) - kinds(before) if k.startswith("posteriors")}
    Memory(objects).delete_tree(f"posteriors/{candidate}")
    assert recalibrate(Memory(objects), "w004", keep=9) == "promoted"
    assert read_all(objects)[-1]["version"] == candidate


def test_a_year_of_daily_windows_keeps_storage_bounded():
    """By the windows that count, the versions that are kept and the run's own; of a day stays its decision alone."""
    objects, sizes = bucket(), []
    fit(Memory(objects))
    for number in range(1, 366):
        objects.clock[0] += 86_400
        better = number % 5 != 0
        store = Memory(objects)
        result = recalibrate(store, f"w{number:03d}", better=better, keep=3, chosen="last:7")
        assert result == ("promoted" if better else "kept")
        daily = {layout.CURRENT, *(key for key in objects.data if key.endswith("/decision.json"))}
        data = {key: value for key, value in objects.data.items() if key not in daily}
        sizes.append((len(data), sum(map(len, data.values()))))
        if number % 30 == 0:
            read_all(objects)
    there = windows_of(store, ownership.read_plan(store))
    assert there[0].name == FIRST and len(there) - 1 <= 7 + 3 + 1
    assert not [key for key in objects.data if "partials/" in key], "the fit's own go too"
    keys, stored = zip(*sizes, strict=True)
    assert max(keys[20:]) <= max(keys[:40]) and max(stored[20:]) <= 1.01 * max(stored[:40])
    assert len(objects.data[layout.CURRENT]) < 366 * 400
    folders = [{k.split("/")[1][:16] for k in objects.data if k.startswith(f)} for f in ("posteriors/", "tuning/")]
    assert all(len(folder) <= 3 + 1 for folder in folders)


# ------------------------------------------------------------------ any order of everything


class Schedules(RuleBasedStateMachine):
    """Any order of promotions, candidates that are kept, rollbacks, dropped windows and collections, by jobs that may die."""

    @initialize()
    def begin(self):
        self.objects, self.number = bucket(), 0
        fit(Memory(self.objects))
        self.history = read_all(self.objects)

    def run(self, store, **given):
        """Recalibrate; whoever dies is dead for two hours before the next rule."""
        self.objects.clock[0] += 60
        try:
            return recalibrate(store, **given)
        except Crash:
            self.objects.clock[0] += 7200
            return "dead"
        except SettingsError as error:  # what a killed job has begun has to be ended, or left out
            known = (
                "another job has deleted it",
                "stays out until it is named",
                "which was rolled back",
                "whose sum is gone",
                "every window there is was dropped",
            )
            assert any(text in str(error) for text in known), error
            return "refused"

    def new(self):
        self.number += 1
        return f"w{self.number:03d}"

    crashes = {"at": st.sampled_from([0, 0, *range(1, 220)]), "when": st.sampled_from(["before", "middle"])}
    kept = {"keep": st.integers(1, 3), "chosen": st.sampled_from(["last:1", "last:2", "all"])}

    @rule(better=st.booleans(), again=st.booleans(), **crashes, **kept)
    def add(self, better, again, at, when, keep, chosen):
        """A new window, or the command of the last one once more."""
        again = again and self.number and self.there(f"w{self.number:03d}")
        name = f"w{self.number:03d}" if again else self.new()
        found = self.run(Memory(self.objects, at, when), name=name, better=better, keep=keep, chosen=chosen)
        assert found in (("promoted" if better else "kept"), "dead", "refused")

    @precondition(lambda self: len(self.windows()) > 1)
    @rule(which=st.integers(0, 9), **crashes, **kept)
    def drop(self, which, at, when, keep, chosen):
        names = self.windows()
        out = pointer.left_out(pointer.read_current(Memory(self.objects)))
        name = names[which % len(names)]
        if set(names) <= {*out, name}:
            return  # the job refuses that: nothing would be left
        if self.run(Memory(self.objects, at, when), name="", drop=name, keep=keep, chosen=chosen) == "promoted":
            current = pointer.read_current(Memory(self.objects))
            assert name in pointer.left_out(current)

    @rule(back=st.integers(0, 9))
    def roll_back(self, back):
        store = Memory(self.objects)
        entry = self.history[back % len(self.history)]
        newest = next(e for e in reversed(self.history) if e["version"] == entry["version"])
        if newest.get("collected"):
            with pytest.raises(SettingsError, match="was collected"):
                pointer.roll_back(store, ownership.read_plan(store), entry["version"])
        else:
            pointer.roll_back(store, ownership.read_plan(store), entry["version"])
            assert pointer.read_current(store)["version"] == entry["version"]

    @rule(
        at=st.integers(1, 220),
        silence=st.sampled_from([0, 700, 7200]),
        first=st.booleans(),
        second=st.booleans(),
        same=st.booleans(),
        **kept,
    )
    def two_drivers(self, at, silence, first, second, same, keep, chosen):
        """Between two operations of the one, which may stand still for long, the other does all of its work.

        But not between a look at the lease and the deletion that follows it at once: see docs/faults.md.
        """
        mine = self.new()
        other = mine if same else self.new()
        seen = []

        def act(operation):
            if operation != "delete":
                self.objects.clock[0] += silence
                living = set() if silence else {outer.counter["sign"]}
                store = Memory(self.objects, living=living)
                seen.append(self.run(store, name=other, better=second, keep=keep, chosen=chosen))
                read_all(self.objects)

        outer = Memory(self.objects, at, act=act)
        try:
            found = self.run(outer, name=mine, better=first, keep=keep, chosen=chosen)
        except CheckpointError as error:  # the other has taken over and collected what this one needs
            found = f"stopped: {error}"
            assert silence and seen and ("deleted" in str(error) or "missing" in str(error)), (found, seen)
        self.objects.clock[0] += 7200
        assert found.partition(":")[0] in ("promoted", "kept", "lost", "taken over", "stopped", "busy", "refused")
        if silence == 0 and seen not in ([], ["busy"]):
            assert at < 8 or found in ("promoted", "kept", "busy", "refused"), "nobody takes over from one that lives"

    def windows(self):
        store = Memory(self.objects)
        return [window.name for window in windows_of(store, ownership.read_plan(store))]

    def there(self, name):
        return name in self.windows()

    @invariant()
    def there_is_one_whole_current_version_and_the_history_only_grows(self):
        if not hasattr(self, "history"):
            return
        now = read_all(self.objects)
        for old, new in zip(self.history, now, strict=False):
            assert {**new, "collected": False} == {**old, "collected": False}
            assert new.get("collected", False) or not old.get("collected", False)
        assert len(now) >= len(self.history)
        self.history = copy.deepcopy(now)

    def teardown(self):
        """Whatever has happened, the next job works, and leaves what it is to leave."""
        if hasattr(self, "history"):
            self.objects.clock[0] += 7200
            name = self.new()
            assert self.run(Memory(self.objects), name=name, keep=1, chosen="last:1") == "promoted"
            found = recalibrations.read_decision(Memory(self.objects), ownership.read_plan(Memory(self.objects)), name)
            assert found["promoted"] and not found.get("pending") and name in self.objects.told
            read_all(self.objects)
            assert len([key for key in kinds(self.objects) if key.startswith("posteriors")]) == 1


def test_any_order_of_everything_leaves_one_current_version_that_the_history_names():
    chosen = settings(
        max_examples=60,
        stateful_step_count=10,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a failure is shown as it was found: to shorten it would take minutes
    )
    run_state_machine_as_test(Schedules, settings=chosen)
