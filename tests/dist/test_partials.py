"""One partial per segment, whoever tries and whatever breaks; what is read back is verified or refused."""

from __future__ import annotations

import errno
import itertools
import os
import threading

import numpy as np
import pytest
import torch

from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError
from laplace_dist.plan.plan import FORMAT_VERSION, build_plan
from laplace_dist.run import layout, lifecycle
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.layout import partial_key
from laplace_dist.run.partial_manifests import read_manifest
from laplace_dist.run.partials import commit_partial, read_factors
from laplace_dist.run.provenance import environment
from laplace_dist.storage.sealed_json import seal_json

SPEC = {
    "structure": "kron",
    "factors": {
        "conv.weight/A": {"shape": [3, 3], "symmetric": True},
        "conv.bias": {"shape": [2], "symmetric": False},
    },
}

ORIGIN = {"data_sha256": "0" * 64, "environment": environment("cpu")}


def make_plan(length=20, weights="w"):
    settings = {"batch_size": 4, "segment_size": 8}
    data = {"length": length, "sha256": "d"}
    return build_plan(settings, data=data, weights=weights, model={"path": "m:f", "args": {}}, spec=SPEC)


def make_sums(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, generator=generator)
    return {
        "conv.weight/A": x.T @ x,
        "conv.bias": torch.randn(2, generator=generator),
        "loss": torch.tensor(2.5, dtype=torch.float64),
    }


PLAN = make_plan()
SEGMENT = PLAN.segments[1]


@pytest.fixture
def store(tmp_path):
    """Return the checkpoint of a run with `PLAN`: whoever commits looks that it is still its own."""
    store = Checkpoint(str(tmp_path / "run"))
    store.create("plan.json", seal_json(PLAN.to_values()))
    return store


def commit(store, sums=None, attempt="a0", plan=PLAN, segment=SEGMENT):
    """Commit a segment of a run that is begun with it, if there is none."""
    store.create(layout.PLAN, seal_json(plan.to_values()))
    return commit_to_run(store, sums, attempt, plan, segment)


def commit_to_run(store, sums=None, attempt="a0", plan=PLAN, segment=SEGMENT):
    return commit_partial(store, plan, segment, sums or make_sums(), segment.stop - segment.start, attempt, **ORIGIN)


def rewrite(store, **changes):
    """Replace fields of the manifest, with a correct seal."""
    key = partial_key(SEGMENT.id)
    store.replace(key, seal_json({**open_json(store.read(key), key), **changes}))


def test_a_partial_comes_back_bit_for_bit(store):
    sums = make_sums()
    receipt = commit(store, sums)
    assert (receipt.segment, receipt.attempt, receipt.won) == ("000001", "a0", True)
    assert receipt.bytes > 0
    assert receipt.seconds > 0
    manifest = read_manifest(store, PLAN, SEGMENT)
    assert (manifest["n_data"], manifest["start"], manifest["stop"]) == (8, 8, 16)
    assert manifest["loss"] == float(sums.pop("loss"))
    back = read_factors(store, PLAN, manifest)
    assert set(back) == set(sums)
    for name, tensor in sums.items():
        assert back[name].dtype == np.float64, "sums do not drift"
        assert np.array_equal(back[name], tensor.numpy())


def test_the_second_commit_loses_and_leaves_nothing(store):
    commit(store)
    before = {key: store.read(key) for key in store.list()}
    receipt = commit(store, make_sums(1), attempt="a1")
    assert (receipt.attempt, receipt.won) == ("a0", False)
    assert {key: store.read(key) for key in store.list()} == before


def test_concurrent_commits_agree_on_one_winner(store):
    receipts, start = [], threading.Barrier(4)

    def race(number):
        start.wait()
        receipts.append(commit(store, make_sums(number), attempt=f"a{number}"))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({receipt.attempt for receipt in receipts}) == 1
    assert sum(receipt.won for receipt in receipts) == 1
    manifest = read_manifest(store, PLAN, SEGMENT)
    assert {key.split("/")[2] for key in store.list("partials") if key.count("/") > 1} == {manifest["attempt"]}


def test_a_retry_that_meets_its_own_manifest_has_won(store, monkeypatch):
    create = Checkpoint.create

    def answer_lost(self, key, data):
        create(self, key, data)
        return False

    create(store, layout.PLAN, seal_json(PLAN.to_values()))
    monkeypatch.setattr(Checkpoint, "create", answer_lost)
    receipt = commit(store)
    assert receipt.won
    assert store.exists("partials/000001/a0/00000/c/0")


def test_attempt_ids_are_unique():
    assert len({new_attempt() for _ in range(100)}) == 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_not_committed(store, bad):
    sums = make_sums()
    sums["conv.bias"][1] = bad
    with pytest.raises(RunFailed, match=r"segment 000001 \(examples 8 to 15\): the sum 'conv.bias' is not finite"):
        commit(store, sums)
    assert store.list() == ["plan.json"]


@pytest.mark.parametrize(
    "change", [{"conv.bias": torch.ones(3)}, {"other": torch.ones(2)}], ids=["shape", "unexpected"]
)
def test_sums_that_do_not_fit_the_plan_are_a_bug(store, change):
    with pytest.raises(AssertionError, match="the plan says"):
        commit(store, {**make_sums(), **change})


@pytest.mark.parametrize("call", range(1, 40))
def test_a_disk_that_fills_up_leaves_no_readable_half_state(store, monkeypatch, call):
    """Whichever flush it is that fails, there is no partial afterwards, or a whole one."""
    fsync, counter, calls = os.fsync, itertools.count(1), []

    def full(handle):
        calls.append(next(counter))
        if call in calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    store.create(layout.PLAN, seal_json(PLAN.to_values()))
    create = Checkpoint.create
    monkeypatch.setattr(Checkpoint, "create", lambda self, key, data: key != layout.PLAN and create(self, key, data))
    monkeypatch.setattr(os, "fsync", full)
    try:
        commit(store)
        assert len(calls) < call
    except RunFailed as error:
        assert "no space left on the device" in str(error)
        assert "Run the same command again" in str(error)
    monkeypatch.undo()
    if store.exists(partial_key(SEGMENT.id)):
        manifest = read_manifest(store, PLAN, SEGMENT)
        back = read_factors(store, PLAN, manifest)
        assert all(np.array_equal(back[name], make_sums()[name].numpy()) for name in back)
    else:
        assert commit(store, attempt="again").won


def test_space_is_given_back_by_a_commit_that_fails(store, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.create(layout.PLAN, seal_json(PLAN.to_values()))
    monkeypatch.setattr(Checkpoint, "create", lambda self, key, data: False)  # of the plan, which is there
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="partials/000001/a0: no space left"):
        commit(store)
    assert store.list() == ["plan.json"]


def test_a_segment_that_is_not_committed_is_missing(store):
    store.check_writable()
    with pytest.raises(MissingObjectError, match="partials/000001.json is missing"):
        read_manifest(store, PLAN, SEGMENT)


def test_an_altered_byte_in_a_partial_is_named_with_what_to_do(store):
    commit(store)
    manifest = read_manifest(store, PLAN, SEGMENT)
    path = os.path.join(store.url, manifest["prefix"], "00000/c/0")
    with open(path, "r+b") as file:
        file.seek(20)
        byte = file.read(1)[0]
        file.seek(20)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(
        CheckpointError,
        match=r"partials/000001/a0/00000/c/0 is truncated or altered.*delete partials/000001.json and run",
    ):
        read_factors(store, PLAN, manifest)


def test_an_altered_or_truncated_manifest_is_refused(store):
    commit(store)
    key = partial_key(SEGMENT.id)
    good = store.read(key)
    for bad in (good[:-1], good[: len(good) // 2], b"", good.replace(b'"n_data": 8', b'"n_data": 9')):
        store.replace(key, bad)
        with pytest.raises(
            CheckpointError, match=r"partials/000001.json is truncated or altered.*delete partials/000001.json"
        ):
            read_manifest(store, PLAN, SEGMENT)


FOREIGN = [
    ({"plan": "0" * 64}, "its plan is '000"),
    ({"segment": "000002"}, "its segment is '000002', expected '000001'"),
    ({"stop": 99}, "its stop is 99, expected 16"),
    ({"n_data": 7}, "its n_data is 7, expected 8"),
    ({"prefix": "../elsewhere"}, "its prefix is '../elsewhere'"),
    ({"attempt": "../../x", "prefix": "partials/000001/../../x"}, "its attempt"),
    ({"arrays": {}}, "differs in 00000"),
]


@pytest.mark.parametrize(("changes", "words"), FOREIGN, ids=[next(iter(c)) for c, _ in FOREIGN])
def test_a_manifest_of_something_else_is_refused(store, changes, words):
    commit(store)
    rewrite(store, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(store, PLAN, SEGMENT)
    assert words in str(caught.value)


def test_a_manifest_of_another_plan_is_refused(store):
    commit(store)
    with pytest.raises(CheckpointError, match=r"partials/000001.json does not belong to this run: its plan.*Delete it"):
        read_manifest(store, make_plan(weights="other"), SEGMENT)


def test_a_manifest_of_a_newer_version_is_refused(store):
    commit(store)
    rewrite(store, format_version=FORMAT_VERSION + 1)
    with pytest.raises(SettingsError, match=f"partials/000001.json has format_version {FORMAT_VERSION + 1}"):
        read_manifest(store, PLAN, SEGMENT)


# ------------------------------------------------------------------ whose run it is


def other_run(store, plan):
    """Another job deletes the run and begins its own."""
    store.delete_tree(layout.PLAN)
    store.create(layout.PLAN, seal_json(plan.to_values()))


def test_a_late_worker_of_a_run_that_was_deleted_stops_itself_before_it_commits(store, monkeypatch):
    """Though it has the old plan, and begun its segment long before."""
    write_arrays = Checkpoint.write_arrays

    def then_deleted(self, *arguments):
        entries = write_arrays(self, *arguments)
        other_run(store, make_plan(weights="other"))
        return entries

    monkeypatch.setattr(Checkpoint, "write_arrays", then_deleted)
    with pytest.raises(SettingsError, match="another job has begun a run there meanwhile"):
        commit(store)
    assert not store.exists(partial_key(SEGMENT.id))
    store.delete_tree(layout.PLAN)
    monkeypatch.setattr(Checkpoint, "write_arrays", lambda *a: store.delete_tree(layout.PLAN) or write_arrays(*a))
    with pytest.raises(SettingsError, match="holds no run any more: another job has deleted it meanwhile"):
        commit(store, attempt="a1")


def test_what_slips_into_another_run_does_not_count_and_makes_way(store):
    """The moment between looking and creating cannot be closed on an object store; the manifest says whose it is."""
    commit(store, make_sums(1), attempt="late")
    ours = make_plan(weights="other")
    other_run(store, ours)
    assert lifecycle.committed(store, ours) == {}
    assert commit(store, attempt="a0", plan=ours).won
    manifest = read_manifest(store, ours, SEGMENT)
    assert manifest["attempt"] == "a0"
    assert np.array_equal(read_factors(store, ours, manifest)["conv.bias"], make_sums()["conv.bias"].numpy())
    assert not commit(store, make_sums(2), attempt="a1", plan=ours).won
