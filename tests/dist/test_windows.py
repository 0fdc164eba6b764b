"""Windows of data: their weighted sums, what a recalibration promotes and keeps, and how a run of several is verified."""

from __future__ import annotations

import shutil

import dist_cases
import numpy as np
import pytest
import torch
from window_cases import add, config, damaged, factors, fit_inline, names_of, same, two_windows

import laplace_dist
from laplace.capture import verify
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution.inline import InlinePool
from laplace_dist.recalibration import RecalibrationJob, rollback
from laplace_dist.run import layout, pointer, recalibrations, versions
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import choose, windows_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.sealed_json import seal_json


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with two windows; tests copy it."""
    return two_windows(tmp_path_factory.mktemp("windows") / "run")


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------ sums


def test_two_windows_are_one_fit_over_the_union(run, tmp_path):
    fit_inline(config(tmp_path / "union", "monday+tuesday", skip_tune=True, skip_evaluate=True))
    found, wanted = factors(run), factors(tmp_path / "union")
    assert found["n"] == wanted["n"] == 64
    for name, value in wanted.items():
        # The convolution's products are float32, and where batches are cut differs.
        assert np.allclose(found[name], value, rtol=1e-5, atol=1e-6 * np.abs(value).max()), name


def test_a_run_whose_sums_another_version_described_in_other_words_goes_on(tmp_path, monkeypatch):
    fit_inline(config(tmp_path, window="monday"))
    before = factors(tmp_path)
    monkeypatch.setattr(verify, "_described", lambda module, key: f"a {type(module).__name__}")
    fit_inline(config(tmp_path, window="monday"))
    assert same(before, factors(tmp_path))
    add(tmp_path, "tuesday")
    assert factors(tmp_path)["n"] == 64


def test_the_same_windows_from_scratch_have_the_same_bits_whatever_they_are_called(run, tmp_path):
    fit_inline(config(tmp_path / "again", window="first", skip_tune=True, skip_evaluate=True))
    found = add(tmp_path / "again", "tuesday", window="second", segment_size=8)
    assert found.version == pointer.read_current(Checkpoint(str(run)))["version"]
    assert same(factors(run), factors(tmp_path / "again"))


def test_a_window_that_is_left_out_is_unlearned_exactly(run, tmp_path):
    found = add(run, "tuesday", drop_window="tuesday")
    fit_inline(config(tmp_path / "alone", skip_tune=True, skip_evaluate=True))
    assert found.promoted and same(factors(run), factors(tmp_path / "alone"))
    assert found.version == pointer.read_current(Checkpoint(str(tmp_path / "alone")))["version"]


def test_old_windows_are_forgotten_by_their_age(run):
    add(run, "wednesday", decay=0.5)
    store = Checkpoint(str(run))
    manifest = versions.read_version(store, read_plan(store), pointer.read_current(store)["version"])
    weights = {term["window"]: term["weight"] for term in manifest["windows"]}
    assert weights == {"monday": 0.25, "tuesday": 0.5, "wednesday": 1.0}
    parts = [factors(run, add(run, "wednesday", windows=day, dry_run=True).version) for day in weights]
    found = factors(run)
    assert found["n"] == 0.25 * 44 + 0.5 * 20 + 27
    for name in found:
        wanted = sum(weight * part[name] for weight, part in zip(weights.values(), parts, strict=True))
        assert np.allclose(found[name], wanted, rtol=1e-14, atol=0), name
    la = laplace_dist.load_posterior(str(run), dist_cases.convnet())
    assert la.n_data == found["n"] and torch.isfinite(la.log_marginal_likelihood())


def test_which_windows_count(run):
    add(run, "wednesday")
    store = Checkpoint(str(run))
    there = windows_of(store, read_plan(store))
    assert [w.name for w in there] == ["monday", "tuesday", "wednesday"]
    chosen = {
        text: [(w.name, x) for w, x in choose(there, text, 0.5)] for text in ("all", "last:2", "wednesday,monday")
    }
    assert chosen == {
        "all": [("monday", 0.25), ("tuesday", 0.5), ("wednesday", 1.0)],
        "last:2": [("tuesday", 0.5), ("wednesday", 1.0)],
        "wednesday,monday": [("monday", 0.5), ("wednesday", 1.0)],
    }
    assert choose(there, "last:9", 1.0) == [(w, 1.0) for w in there]


# ------------------------------------------------------------------ promotion


def test_a_candidate_that_is_no_worse_is_promoted_and_the_history_kept(run):
    store = Checkpoint(str(run))
    before, found = pointer.read_current(store), add(run, "wednesday")
    now = pointer.read_current(store)
    assert found.promoted and now["version"] == found.version != before["version"]
    assert [entry["version"] for entry in now["history"]] == [e["version"] for e in before["history"]] + [found.version]
    assert now["history"][0]["why"] == "the first" and "interval" in now["history"][-1]["why"]
    decision = recalibrations.read_decision(store, read_plan(store), "wednesday")
    assert set(decision["metrics"]) == {"map", "current", "candidate"} == set(found.metrics)
    assert laplace_dist.verify(str(run), shallow=True).url == str(run)


def test_one_that_is_not_shown_to_be_no_worse_is_kept_a_candidate(run):
    store = Checkpoint(str(run))
    before = store.read(layout.CURRENT)
    found = add(run, "wednesday", margin_nll=0.0, margin_ece=0.0, windows="wednesday")
    assert not found.promoted and "not shown to be no worse" in found.why and "margin 0" in found.why
    assert store.read(layout.CURRENT) == before


def test_a_dry_run_decides_and_changes_nothing_that_counts(run):
    store = Checkpoint(str(run))
    before = store.read(layout.CURRENT)
    found = add(run, "wednesday", dry_run=True)
    assert not found.promoted and "dry run" in found.why and store.read(layout.CURRENT) == before
    assert recalibrations.read_decision(store, read_plan(store), "wednesday") is None
    assert add(run, "wednesday").promoted


def test_the_same_window_twice_is_nothing_to_do(run, monkeypatch, capsys):
    first = add(run, "wednesday")
    before = Checkpoint(str(run)).read(layout.CURRENT)
    monkeypatch.setattr(InlinePool, "submit", lambda *_: pytest.fail("a task was submitted"))
    again = add(run, "wednesday")
    assert again == first and Checkpoint(str(run)).read(layout.CURRENT) == before
    assert "wednesday was decided before: nothing to do" in capsys.readouterr().out


def test_a_dry_run_leaves_no_window_that_counts(run, capsys):
    add(run, "wednesday", dry_run=True)
    version = add(run, "thursday").version
    assert "not counted by --windows all: wednesday" in capsys.readouterr().out
    assert names_of(run, version) == ["monday", "tuesday", "thursday"]
    assert names_of(run, add(run, "wednesday").version) == ["monday", "tuesday", "wednesday", "thursday"]


def test_a_window_that_did_not_finish_stops_no_other_one(run, monkeypatch, capsys):
    """By a rule it is passed over; who names it is refused before anything is computed."""
    with monkeypatch.context() as patch:
        patch.setattr(RecalibrationJob, "sum_window", lambda self: (_ for _ in ()).throw(RunFailed("poisoned")))
        with pytest.raises(RunFailed, match="poisoned"):
            add(run, "wednesday")
    before = Checkpoint(str(run)).list("windows")
    message = "--windows: window wednesday is not finished.*--window wednesday and its data.*--drop-window wednesday"
    with pytest.raises(SettingsError, match=message):
        add(run, "thursday", windows="wednesday,thursday")
    assert Checkpoint(str(run)).list("windows") == before
    assert names_of(run, add(run, "thursday").version) == ["monday", "tuesday", "thursday"]
    assert "not counted by --windows all: wednesday" in capsys.readouterr().out
    add(run, "wednesday", drop_window="wednesday")
    assert names_of(run, add(run, "friday").version) == ["monday", "tuesday", "thursday", "friday"]
    assert "not counted" not in capsys.readouterr().out.partition("left out")[2]


def test_another_fit_job_leaves_what_was_promoted(run, capsys):
    before = pointer.read_current(Checkpoint(str(run)))
    result = fit_inline(config(run, window="monday"))
    assert result.version == before["version"] == pointer.read_current(Checkpoint(str(run)))["version"]
    assert "which a recalibration has promoted, and stays so" in capsys.readouterr().out


def test_a_rollback_is_a_promotion_of_what_was_current_before(run):
    store = Checkpoint(str(run))
    history = pointer.read_current(store)["history"]
    rollback(str(run), history[0]["version"])
    now = pointer.read_current(store)
    assert (now["version"], now["tuning"]) == (history[0]["version"], history[0]["tuning"])
    assert [entry["why"] for entry in now["history"]][-1] == "rolled back" and len(now["history"]) == 3
    rollback(str(run), history[0]["version"])
    assert pointer.read_current(store) == now, "what is current already is nothing to do"
    with pytest.raises(SettingsError, match="got 'none', which was never current"):
        rollback(str(run), "none")


def test_what_somebody_rolled_back_from_is_not_promoted_by_the_next_tick(run, capsys):
    store = Checkpoint(str(run))
    first = pointer.read_current(store)["version"]
    version = add(run, "wednesday").version
    rollback(str(run), first)
    before = store.read(layout.CURRENT)
    with pytest.raises(
        SettingsError,
        match="--window: got 'wednesday', which was dropped or rolled back.*--windows monday,tuesday,wednesday",
    ):
        add(run, "wednesday")
    assert store.read(layout.CURRENT) == before
    assert names_of(run, add(run, "thursday").version) == ["monday", "tuesday", "thursday"]
    assert "left out, since they were dropped or rolled back: wednesday" in capsys.readouterr().out
    assert add(run, "wednesday", windows="monday,tuesday,wednesday").version == version
    assert pointer.read_current(store)["version"] == version, "who names it has been asked"


def test_a_version_of_the_same_windows_that_was_rolled_back_is_not_made_again_unasked(run):
    store = Checkpoint(str(run))
    first = add(run, "wednesday").version
    forgetting = add(run, "wednesday", decay=0.5).version
    assert first != forgetting
    rollback(str(run), first)
    with pytest.raises(
        SettingsError, match=f"makes version {forgetting} again, which was rolled back.*--windows monday,tuesday,wed"
    ):
        add(run, "wednesday", decay=0.5)
    assert pointer.read_current(store)["version"] == first
    assert add(run, "wednesday", decay=0.5, windows="monday,tuesday,wednesday").version == forgetting


def test_a_drop_that_is_refused_says_that_the_window_stays_in_and_what_drops_it(run):
    found = add(run, "tuesday", drop_window="tuesday", gate=["nll<=-10"])
    assert not found.promoted and "window tuesday stays in, in the next candidates too" in found.why
    assert "--margin-nll" in found.why and "without --gate" in found.why
    assert add(run, "tuesday", drop_window="tuesday").promoted


def test_partials_of_a_window_are_dropped_once_its_sum_is_there(run):
    store = Checkpoint(str(run))
    assert not store.list("windows/tuesday/partials") and store.exists("windows/tuesday/window.json")
    assert not store.list("partials"), "those of the fit go too"
    add(run, "wednesday", keep_partials=True)
    assert store.list("windows/wednesday/partials")


# ------------------------------------------------------------------ verification


def test_a_run_of_several_windows_is_whole(run):
    add(run, "wednesday", decay=0.5)
    report = laplace_dist.verify(str(run))
    assert (report.problems, report.orphans) == ([], {}) and len(report.versions) == 3


@pytest.mark.parametrize("pattern", ["windows/tuesday/parts/*/*/sum/c/0", "windows/tuesday/window.json", "windows/tuesday/plan.json",
                                     "recalibration/tuesday/decision.json"])  # fmt: skip
def test_damage_in_a_window_is_named(run, pattern):
    store = Checkpoint(str(run))
    (path,) = run.glob(pattern)
    key = str(path.relative_to(run))
    damaged(store, key)
    report = laplace_dist.verify(str(run))
    assert any(named == key or key.startswith(named) for named, _ in report.problems), report.problems


def test_what_a_crash_leaves_in_a_window_is_an_orphan_and_collected(run):
    store = Checkpoint(str(run))
    (part,) = {
        key.rpartition("/")[2].removesuffix(".json") for key in store.list("windows/tuesday/parts", recursive=False)
    }
    left = f"windows/tuesday/parts/{part}/{'0' * 32}"
    store.write_arrays(left, {"sum": np.zeros(3)})
    before = set(store.list())
    assert set(laplace_dist.verify(str(run)).orphans) == {left}
    report = laplace_dist.verify(str(run), collect_orphans_older_than=0)
    assert (report.problems, report.collected) == ([], [left])
    assert before - set(store.list()) == {key for key in before if key.startswith(left)}


def test_a_version_that_is_not_the_sum_of_its_windows_is_named(run):
    store = Checkpoint(str(run))
    version = pointer.read_current(store)["version"]
    key = layout.version_key(version)
    manifest = open_json(store.read(key), key)
    values = {n: 2 * store.read_array(p["prefix"], n, p["entry"]) for n, p in manifest["factors"].items()}
    plan = read_plan(store)
    symmetric = {name for name, factor in plan.spec["factors"].items() if factor["symmetric"]}
    prefix = f"posteriors/{version}/forged"
    entries = store.write_arrays(prefix, values, symmetric)
    manifest["factors"] = {name: {"prefix": prefix, "entry": entry} for name, entry in entries.items()}
    store.replace(key, seal_json(manifest))
    assert key in {
        key for key, text in laplace_dist.verify(str(run)).problems if "not the weighted sum of its windows" in text
    }
