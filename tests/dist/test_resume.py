"""Starting, continuing, refusing and clearing a run: what is left is the plan minus what is committed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from given_weights import Given
from test_partials import ORIGIN, PLAN, make_plan, make_sums
from test_partials import commit_to_run as commit
from torch import nn

from laplace_dist import status, verify
from laplace_dist.errors import CheckpointError, MissingObjectError, SettingsError
from laplace_dist.plan.plan import FORMAT_VERSION
from laplace_dist.run import evaluations
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.layout import PLAN as PLAN_KEY
from laplace_dist.run.lifecycle import committed, open_run, remaining
from laplace_dist.run.ownership import has, read_plan
from laplace_dist.run.place import clear
from laplace_dist.run.run_weights import load_run_weights
from laplace_dist.run.weights import dump_weights, weights_digest
from laplace_dist.storage.sealed_json import seal_json


@pytest.fixture
def store(tmp_path):
    return Checkpoint(str(tmp_path / "run"))


def start(store, plan=PLAN, fresh=False, weights=b"weights", say=lambda text: None):
    given = {"model": nn.Linear(1, 1), "weights": Given(weights), "probe": lambda: None}
    return open_run(store, plan, **given, config_yaml="seed: 0\n", fresh=fresh, say=say)


def test_a_run_starts_once_and_continues_afterwards(store):
    assert start(store) == (PLAN, False)
    assert store.list() == ["config.yaml", "plan.json", "weights.safetensors"]
    assert read_plan(store) == PLAN
    commit(store)
    assert start(store) == (PLAN, True)
    assert set(committed(store, PLAN)) == {"000001"}


def test_what_is_left_is_the_plan_minus_what_is_committed(store):
    start(store)
    assert committed(store, PLAN) == {}
    assert remaining(PLAN, {}) == list(PLAN.segments)
    for number, segment in enumerate(PLAN.segments):
        commit(store, segment=segment)
        done = committed(store, PLAN)
        assert list(done) == [s.id for s in PLAN.segments[: number + 1]]
        assert remaining(PLAN, done) == list(PLAN.segments[number + 1 :])
    assert all(manifest["arrays"] for manifest in done.values())
    light = committed(store, PLAN, arrays=False)
    assert [m["n_data"] for m in light.values()] == [8, 8, 4]
    assert not any("arrays" in manifest for manifest in light.values())


def test_arrays_without_a_manifest_do_not_count(store):
    start(store)
    commit(store)
    store.delete_tree("partials/000001.json")
    assert committed(store, PLAN) == {}


def test_a_run_that_lost_its_weights_before_they_were_written_gets_them(store):
    start(store)
    store.delete_tree("weights.safetensors")
    assert start(store) == (PLAN, True)
    assert store.read("weights.safetensors") == b"weights"


def test_another_plan_is_refused_with_both_values_and_changes_nothing(store):
    start(store)
    before = {key: store.read(key) for key in store.list()}
    with pytest.raises(SettingsError) as caught:
        start(store, make_plan(length=19, weights="w2"), weights=b"other")
    message = str(caught.value)
    assert "--data: the train split's length changed: stored 20 examples, now 19" in message
    assert "--weights (values, as sha256): stored 'w', now 'w2'" in message
    assert "--fresh" in message
    assert {key: store.read(key) for key in store.list()} == before


def test_a_newer_run_is_refused(store):
    start(store)
    values = open_json(store.read("plan.json"), "plan.json")
    store.replace("plan.json", seal_json({**values, "format_version": FORMAT_VERSION + 1}))
    for call in (start, read_plan):
        with pytest.raises(
            SettingsError, match=rf"plan.json has format_version {FORMAT_VERSION + 1}.*reads up to {FORMAT_VERSION}"
        ):
            call(store)


def test_a_truncated_plan_is_refused(store):
    start(store)
    store.replace("plan.json", store.read("plan.json")[:-9])
    with pytest.raises(CheckpointError, match="plan.json is truncated or altered"):
        start(store)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--checkpoint .*file/run': cannot write"):
        start(Checkpoint(str(tmp_path / "file" / "run")))


def test_a_manifest_of_no_segment_is_refused(store):
    start(store)
    store.create("partials/000009.json", b"{}")
    with pytest.raises(CheckpointError, match=r"partials/000009.json is of no segment of this plan \(3 segments\)"):
        committed(store, PLAN)


OTHER = make_plan(length=28, weights="other")


def late(store, monkeypatch, number):
    """Commit a segment as a worker of another run does that has looked at the plan before that run was deleted."""
    with monkeypatch.context() as patched:
        patched.setattr("laplace_dist.run.ownership.confirm", lambda *_: None)
        commit(store, make_sums(7), attempt="late", plan=OTHER, segment=OTHER.segments[number])


def test_partials_of_a_run_that_was_deleted_do_not_count_and_make_way(store, monkeypatch):
    """They were refused once, and stopped a run that was not to blame for them."""
    start(store)
    late(store, monkeypatch, 1)
    late(store, monkeypatch, 3)  # of no segment of this plan
    said = []
    assert committed(store, PLAN, say=said.append) == {}
    assert [line.split()[0] for line in said] == ["partials/000001.json", "partials/000003.json"]
    assert all("does not count: a worker of a run that was deleted (--fresh) wrote it late" in line for line in said)
    receipt = commit(store)
    assert (receipt.attempt, receipt.won) == ("a0", True)
    assert list(committed(store, PLAN)) == ["000001"]
    report = verify(store.url, collect_orphans_older_than=0)
    assert [key for key, _ in report.problems] == ["weights.safetensors"], "which are a stand-in"
    assert {key for key, _ in report.notes} == {"partials/000003.json"}
    assert report.collected == ["partials/000001/late", "partials/000003/late"]


@pytest.mark.parametrize("fresh", [OTHER, PLAN], ids=["another plan", "the same settings"])
def test_a_worker_of_a_run_that_was_deleted_stops_itself(store, fresh):
    """Even where the run that took its place has the same settings: the arrays that it has written are gone."""
    first, second = (replace(plan, run=digit * 32) for plan, digit in ((PLAN, "a"), (fresh, "b")))
    start(store, first)
    clear(store)
    with pytest.raises(SettingsError, match="holds no run any more: another job has deleted it meanwhile"):
        commit(store, plan=first)
    assert start(store, second)[1] is False
    with pytest.raises(SettingsError, match="another job has begun a run there meanwhile"):
        commit(store, attempt="a1", plan=first)
    assert committed(store, second) == {}
    assert start(store, replace(second, run="c" * 32)) == (second, True), "the id is the run's, and no setting"


def test_a_run_that_is_being_deleted_is_nobodys_any_more(store, monkeypatch):
    """From the first deletion on: what a worker of it commits now may name arrays that are deleted next."""
    start(store)
    delete, refused = Checkpoint.delete_tree, []

    def watched(self, key):
        if key.startswith("partials/"):
            refused.append(pytest.raises(SettingsError, commit, self, segment=PLAN.segments[2]))
        delete(self, key)

    commit(store)
    monkeypatch.setattr(Checkpoint, "delete_tree", watched)
    clear(store)
    assert len(refused) > 1


def test_what_a_worker_of_a_deleted_run_leaves_is_no_reason_to_refuse_a_start(store, monkeypatch):
    """The driver of --fresh has died between the deletion and its own plan, and a worker has committed meanwhile."""
    late(store, monkeypatch, 1)
    assert store.list("partials")
    assert start(store) == (PLAN, False)
    assert committed(store, PLAN) == {}


def test_tuning_and_evaluation_of_a_deleted_run_are_noted_not_refused(store):
    start(store)
    for key, fields in ((f"{TUNING}.json", TUNED), (f"{EVALUATION}.json", EVALUATED)):
        store.create(key, seal_json({"format_version": 2, "key": key, **fields}))
    report = verify(store.url)
    assert [key for key, _ in report.problems] == ["weights.safetensors"], "which are a stand-in"
    assert {f"{TUNING}.json", f"{EVALUATION}.json"} == {key for key, text in report.notes if "does not have" in text}


TUNED = {
    "settings": {},
    "shards": ["000000"],
    "prefix": "tuning/x",
    "arrays": {},
    "sigma_noise": None,
    "log_marginal_likelihood": 0.0,
}
EVALUATED = {"settings": {}, "shards": {"test": ["000000"]}, "metrics": {}}


def test_scores_of_a_deleted_run_with_the_same_settings_are_computed_again(store, monkeypatch):
    """Their keys are the same, since the version is, and the arrays of some have been deleted."""
    first, second = (replace(PLAN, run=digit * 32) for digit in "ab")
    assert first.digest != second.digest and first.content == second.content == PLAN.digest
    start(store, second)
    key, arrays = f"{EVALUATION}/test-000000.json", {"map/nll": np.ones(4)}
    with monkeypatch.context() as patched:
        patched.setattr("laplace_dist.run.ownership.confirm", lambda *_: None)
        evaluations.commit_shard(store, first, key, arrays, ORIGIN["environment"])
    assert not has(store, second, key)
    evaluations.commit_shard(store, second, key, arrays, ORIGIN["environment"])
    assert has(store, second, key) and not has(store, first, key)


def test_weights_of_a_run_that_was_deleted_make_way(store):
    late = []

    class Late(Checkpoint):
        def create(self, key, data):
            if key == "weights.safetensors" and not late:
                late.append(super().create(key, b"of the run before"))
            return super().create(key, data)

    start(Late(store.url))
    assert late and store.read("weights.safetensors") == b"weights"


def fill(store):
    """Make a finished run, with a user's file beside it."""
    start(store)
    commit(store)
    for key in (
        f"{VERSION}/a/x",
        f"{VERSION}.json",
        "CURRENT.json",
        f"{TUNING}.json",
        f"{EVALUATION}/test-000000.json",
    ):
        store.create(key, b"x")
    for key in USERS:
        store.create(key, b"mine")


VERSION, TUNING, EVALUATION = (
    f"posteriors/{16 * 'a'}",
    f"tuning/{16 * 'a'}-{16 * 'b'}",
    f"evaluation/{16 * 'a'}-{16 * 'c'}",
)
# What lies beside a run, as similar to it as it may be.
USERS = ["evaluation/my_eval.py", "notes.txt", "partials/readme", "posteriors/mine/x", "tuning.json", "weights.pt"]


def test_fresh_deletes_the_run_and_nothing_else(store):
    fill(store)
    said = []
    assert start(store, make_plan(length=19), fresh=True, say=said.append)[1] is False
    assert store.list() == sorted(["config.yaml", "plan.json", "weights.safetensors", *USERS])
    assert "--fresh: deleting the run at" in said[0] and all(name in said[0] for name in ["; kept: ", *USERS])
    assert read_plan(store).n_examples == 19


def test_clearing_can_be_interrupted_anywhere(store, monkeypatch):
    """Whatever is deleted so far, no reader is left with a name whose bytes are gone, and the plan goes last."""
    fill(store)
    delete, seen = Checkpoint.delete_tree, []

    def watched(self, key):
        keys = set(self.list())
        seen.append("plan.json" in keys)
        assert "CURRENT.json" not in keys or f"{VERSION}.json" in keys
        for manifest, arrays in (
            (f"{VERSION}.json", f"{VERSION}/"),
            ("partials/000001.json", "partials/000001/"),
        ):
            assert manifest not in keys or any(k.startswith(arrays) for k in keys)
        delete(self, key)

    monkeypatch.setattr(Checkpoint, "delete_tree", watched)
    clear(store)
    assert len(seen) > 8
    assert all(seen)
    assert store.list() == USERS


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "weights.safetensors", "coverage.tsv", "report.html", "evaluation/my_eval.py", ".git/HEAD"),
        *("report/numbers.json", "evaluation/metrics.json"),
    ],
)
def test_a_place_that_is_not_empty_and_holds_no_run_is_refused_and_left_alone(store, name, fresh):
    store.create(name, b"mine")
    with pytest.raises(SettingsError, match=rf"holds no run.*but is not empty: {name.split('/')[0]}"):
        start(store, fresh=fresh)
    assert store.list() == [name] and store.read(name) == b"mine"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("plan", [b'{"terraform": 1}', b"mine", b"", b"[1]", b'{"sha256": "of something"}'])
def test_a_plan_that_is_no_runs_is_somebody_elses_and_nothing_is_deleted_for_it(store, plan, fresh):
    mine = {
        name: b"mine" for name in ("config.yaml", "weights.safetensors", "report.html", "coverage.tsv", "notes.txt")
    }
    mine["plan.json"] = plan
    for name, content in mine.items():
        store.create(name, content)
    with pytest.raises(SettingsError, match="holds no run .plan.json is no plan of a run., but is not empty") as caught:
        start(store, fresh=fresh)
    assert "--fresh" not in str(caught.value)
    assert {name: store.read(name) for name in store.list()} == mine


@pytest.mark.parametrize("content", [b'{"format_version": 2, "sha256": "0"}', b"cut of"])
def test_a_damaged_plan_beside_a_runs_own_files_is_said_to_be_that(store, content):
    start(store, weights=dump_weights(nn.Linear(3, 2)))
    for key in [key for key in store.list() if key not in ("config.yaml", "weights.safetensors")]:
        store.delete_tree(key)
    store.create(PLAN_KEY, content)
    with pytest.raises(CheckpointError, match="plan.json is truncated or altered"):
        start(store)


def test_signs_of_life_and_decompositions_that_outlive_a_deletion_do_not_count(store):
    store.create(f"jobs/{32 * '0'}.json", b"{}")
    store.create(f"decompositions/{16 * '0'}/00000.json", b"{}")
    assert start(store) == (PLAN, False)


def test_what_a_job_of_a_deleted_run_leaves_at_that_moment_does_not_count(store):
    """Its weights and settings, sealed, with no plan; weights of another model are not overwritten."""
    model = nn.Linear(3, 2)
    start(store, weights=dump_weights(model))
    kept = {name: store.read(name) for name in ("config.yaml", "weights.safetensors")}
    clear(store)
    for name, content in kept.items():
        store.create(name, content)
    with pytest.raises(
        SettingsError, match="holds no run.*but the weights.safetensors of another one. Nothing was changed"
    ):
        start(store, weights=dump_weights(nn.Linear(3, 2)))
    assert {name: store.read(name) for name in store.list()} == kept
    assert start(store, weights=dump_weights(model)) == (PLAN, False)


def test_what_an_interrupted_start_leaves_does_not_count(store):
    store.create(f"probe-{16 * '0'}.safetensors", b"of a driver that died before its plan")
    store.create(f"probe-{32 * '0'}", b"of the check whether a place can be written to")
    store.create(f"jobs/{32 * '0'}.json", b"a sign of life of one whose run was deleted")
    (Path(store.url) / "lost+found").mkdir()
    assert start(store) == (PLAN, False)


def test_status(store):
    with pytest.raises(MissingObjectError, match="there is no run at .*no plan.json"):
        status(store.url)
    start(store)
    commit(store)
    found = status(store.url)
    assert (found["segments"], found["segments_committed"], found["examples_committed"]) == (3, 1, 8)
    assert (found["complete"], found["posterior"]) == (False, False)


def test_the_runs_own_weights_are_verified(store):
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    plan = make_plan(weights=weights_digest(model))
    start(store, plan, weights=dump_weights(model))
    load_run_weights(store, plan, other)
    assert weights_digest(other) == weights_digest(model)
    good = store.read("weights.safetensors")
    path = os.path.join(store.url, "weights.safetensors")
    for bad in (good[:-4], good[:4], b"", good[:-1] + bytes([good[-1] ^ 1])):
        with open(path, "wb") as file:
            file.write(bad)
        with pytest.raises(CheckpointError, match=r"weights.safetensors"):
            load_run_weights(store, plan, other)
    os.unlink(path)
    with pytest.raises(MissingObjectError, match=r"weights.safetensors is missing"):
        load_run_weights(store, plan, other)
