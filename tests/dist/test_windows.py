"""Windows of data: their weighted sums, what a recalibration promotes and keeps, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import dist_cases
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

import laplace_dist
from laplace_dist import cli
from laplace_dist.demo import digits
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.execution.inline import InlinePool
from laplace_dist.job import Job, evaluate_posterior, fit, tune_posterior
from laplace_dist.recalibration import RecalibrationJob, recalibrate, rollback
from laplace_dist.run import layout, pointer, recalibrations, versions
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import choose, windows_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.sealed_json import seal_json

SIZES = {"monday": 44, "tuesday": 20, "wednesday": 27, "thursday": 21, "friday": 22}


def days(split: str, day: str, kind: str = "float32") -> TensorDataset:
    """Return one day's data; what is fresh is the same every day, and enough. `a+b` is two days."""
    if split != "train":
        parts = [dist_cases.tensors(name) for name in (split, "train", "val", "test")]
        return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    parts = []
    for name in day.split("+"):
        if name == "none":
            return TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64))
        generator = torch.Generator().manual_seed(100 + list(SIZES).index(name))
        x = torch.randn(SIZES[name], 1, 6, 6, generator=generator, dtype=torch.float64)
        parts.append((x.to(getattr(torch, kind)), (x.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2)))
    return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def config(checkpoint, day="monday", **changes):
    given = {
        "data": "test_windows:days",
        "data_args": {"day": day},
        "margin_nll": 10.0,
        "margin_ece": 1.0,
        "grid_size": 5,
        "prior_range": [1e-4, 1e4],
    }
    return dist_cases.config(checkpoint, **{**given, "skip_tune": False, "skip_evaluate": False, **changes})


def fit_inline(chosen):
    return fit(chosen, executor=laplace_dist.Inline)


def add(checkpoint, day, **changes):
    extra = {name: changes.pop(name) for name in ("dry_run", "drop_window") if name in changes}
    chosen = config(checkpoint, day, **{"window": day, **changes})
    return recalibrate(chosen, laplace_dist.Inline, **extra)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with two windows; tests copy it."""
    place = tmp_path_factory.mktemp("windows") / "run"
    fit_inline(config(place, window="monday"))
    add(place, "tuesday")
    return place


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def factors(place, version=None):
    store = Checkpoint(str(place))
    version = version or pointer.read_current(store)["version"]
    manifest = versions.read_version(store, read_plan(store), version)
    found = {n: store.read_array(p["prefix"], n, p["entry"]) for n, p in manifest["factors"].items()}
    return {**found, "loss": manifest["loss"], "n": manifest["n_data"]}


def names_of(place, version):
    store = Checkpoint(str(place))
    return versions.windows_in(store, read_plan(store), version)


def same(one, other):
    return all(np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes() for name in one)


# ------------------------------------------------------------------ sums


def test_two_windows_are_one_fit_over_the_union(run, tmp_path):
    fit_inline(config(tmp_path / "union", "monday+tuesday", skip_tune=True, skip_evaluate=True))
    found, wanted = factors(run), factors(tmp_path / "union")
    assert found["n"] == wanted["n"] == 64
    for name, value in wanted.items():
        # The convolution's products are float32, and where batches are cut differs.
        assert np.allclose(found[name], value, rtol=1e-5, atol=1e-6 * np.abs(value).max()), name


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


def damaged(store, key):
    content = bytearray(store.read(key))
    content[len(content) // 2] ^= 1
    store.replace(key, bytes(content))


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


# ------------------------------------------------------------------ two jobs, and what dies


def passing(store, job, *, lives):
    """Return what lets time pass without passing any: another job renews its sign of life meanwhile, or is silent for long."""

    def wait(seconds):
        path = Path(store.url, layout.lease_key(job))
        when = path.stat().st_mtime + (seconds if lives else -recalibrations.SILENT_SECONDS)
        os.utime(path, (when, when))

    return staticmethod(wait)


def test_of_two_at_once_one_works_and_the_other_says_so(run, capsys, monkeypatch):
    with RecalibrationJob(config(run, "wednesday", window="wednesday"), laplace_dist.Inline) as job:
        assert job.take()
        monkeypatch.setattr(RecalibrationJob, "wait", passing(job.store, job.session.lease.job, lives=True))
        assert add(run, "wednesday") is None
        said = capsys.readouterr().out
        assert "has begun and not ended; waiting up to 600 s" in said and "another recalibration of" in said
    assert add(run, "wednesday").promoted


def test_a_job_that_gave_no_sign_of_life_is_taken_over_from_and_promotes_nothing(run, monkeypatch):
    store = Checkpoint(str(run))
    job = RecalibrationJob(config(run, "wednesday", window="wednesday"), laplace_dist.Inline)
    assert job.take()
    monkeypatch.setattr(RecalibrationJob, "wait", passing(store, job.session.lease.job, lives=False))
    assert add(run, "wednesday").promoted
    before = store.read(layout.CURRENT)
    with pytest.raises(SettingsError, match="another recalibration of .* has taken over.*Nothing was promoted"):
        job._promote("late", {"candidate": {"version": "0" * 16, "tuning": None, "evaluation": None}, "why": "late"})
    assert store.read(layout.CURRENT) == before
    job.session.close()


KILLED = """
import os, signal, sys
import test_windows
from laplace_dist.recalibration import RecalibrationJob

RecalibrationJob.sum_window = lambda self: os.kill(os.getpid(), signal.SIGKILL)
test_windows.add(sys.argv[1], "wednesday")
"""


def test_a_recalibration_that_was_killed_is_continued_by_the_same_command(run, monkeypatch, capsys):
    """At once: the sign of life of the dead one is as young as that of one that lives."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(run)], env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert ended.returncode == -signal.SIGKILL
    store = Checkpoint(str(run))
    job = open_json(store.read(layout.RECALIBRATION_LEASE), layout.RECALIBRATION_LEASE)["job"]
    assert store.exists(layout.lease_key(job))
    monkeypatch.setattr(RecalibrationJob, "wait", passing(store, job, lives=False))
    assert add(run, "wednesday").promoted
    assert "continuing window wednesday" in capsys.readouterr().out


def test_what_is_current_counts_from_the_lease_on(run, monkeypatch):
    """A promotion by the job before, which ends at that moment, is no reason to refuse after all the work."""
    first, real = pointer.read_current(Checkpoint(str(run)))["history"][0]["version"], recalibrations.take

    def meanwhile(*given):
        rollback(str(run), first)
        return real(*given)

    monkeypatch.setattr(recalibrations, "take", meanwhile)
    assert add(run, "wednesday", windows="monday,tuesday,wednesday").promoted


def test_what_another_has_made_current_meanwhile_is_not_overwritten(run, monkeypatch):
    store, real = Checkpoint(str(run)), RecalibrationJob.score
    history = pointer.read_current(store)["history"]

    def meanwhile(self, version, tuning):
        if pointer.read_current(store)["history"] == history:
            rollback(str(run), history[0]["version"])
        return real(self, version, tuning)

    monkeypatch.setattr(RecalibrationJob, "score", meanwhile)
    with pytest.raises(SettingsError, match=f"another job has made version {history[0]['version']} current"):
        add(run, "wednesday")
    assert pointer.read_current(store)["version"] == history[0]["version"]
    assert add(run, "wednesday").promoted


def test_killed_after_any_task_the_same_command_goes_on(run, kept, tmp_path, monkeypatch):
    submitted, real = [], InlinePool.submit
    monkeypatch.setattr(InlinePool, "submit", lambda self, task: submitted.append(task.what) or real(self, task))
    wanted = add(run, "wednesday")
    again, total, left = tmp_path / "again", len(submitted), [0]
    shutil.copytree(kept, again)

    def deadly(self, task):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, task)

    monkeypatch.setattr(InlinePool, "submit", deadly)
    found, deaths = None, 0
    while found is None:
        left[0] = deaths  # so many tasks are carried out, the next one kills
        try:
            found = add(again, "wednesday")
        except KeyboardInterrupt:
            deaths += 1
    assert 5 < deaths < total and found == replace(wanted, checkpoint=str(again))
    assert same(factors(run), factors(again))


# ------------------------------------------------------------------ refusals

REFUSED = {
    "the window of the fit": ({"window": "monday"}, "--window: got 'monday', which is that of the fit itself"),
    "shared data": ({"window": "copy", "day": "tuesday"}, "window copy shares examples with window tuesday"),
    "partly shared data": ({"window": "copy", "day": "tuesday+wednesday"}, "copy shares examples with window tuesday"),
    "other data under a name": ({"window": "tuesday"}, r"--window tuesday: it was begun with other data"),
    "no data": ({"day": "none"}, "--data"),
    "unknown windows": (
        {"windows": "monday,sunday"},
        "--windows: got 'monday,sunday', but the run has no window sunday",
    ),
    "nonsense": ({"windows": "last:0"}, "--windows: got 'last:0'; expected all, last:K"),
    "no name": ({"windows": "a,,b"}, "--windows: got 'a,,b'; expected all, last:K"),
    "a rule among names": ({"windows": "all,monday"}, "--windows: got 'all,monday'"),
    "a name twice": ({"windows": "monday,monday"}, "--windows: got 'monday,monday'"),
    "a window called all": ({"window": "all"}, "--window: got 'all'; expected a name of letters"),
    "a window called as a rule": ({"window": "last:3"}, "--window: got 'last:3'; expected a name of letters"),
    "a window called as a drop": ({"window": "without-monday"}, "--window: got 'without-monday'"),
    "a window in a folder": ({"window": "a/b"}, "--window: got 'a/b'; expected a name of letters"),
    "another backend": ({"backend": "curvlinops"}, "--backend: stored 'native', now 'curvlinops'"),
    "another batch size": ({"batch_size": 5}, "--batch-size: stored 4, now 5"),
    "another model": ({"model": "dist_cases:tiny", "model_args": {"name": "one unit"}}, "--model|weights"),
    "fresh": ({"fresh": True}, "--fresh"),
    "another drop": ({"drop_window": "sunday"}, "--drop-window: got 'sunday'; expected one of several windows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_the_current_posterior_as_it_is(run, case):
    changes, message = REFUSED[case]
    store = Checkpoint(str(run))
    before = everything(store)
    with pytest.raises((SettingsError, RunFailed), match=message):
        add(run, changes.get("day", "wednesday"), **{k: v for k, v in changes.items() if k != "day"})
    after = everything(store)
    assert after[layout.CURRENT] == before[layout.CURRENT]
    assert after == before or add(run, "wednesday", window="after").promoted, "what was begun is in nobody's way"


def everything(store):
    """Return all objects of a run but the records of its jobs."""
    return {key: store.read(key) for key in store.list() if not key.startswith(("jobs/", "status/"))}


JOBS = {
    "recalibrate": lambda place, **given: add(place, "wednesday", **given),
    "drop": lambda place, **given: add(place, "tuesday", drop_window="tuesday", **given),
    "tune": lambda place, **given: tune_posterior(config(place, **given), laplace_dist.Inline),
    "evaluate": lambda place, **given: evaluate_posterior(config(place, **given), laplace_dist.Inline),
}
OTHERS = {
    "weights": ({"weights": "other"}, r"--weights .*other.safetensors \(values, as sha256\): stored '.*', now '"),
    "missing weights": ({"weights": "none"}, "--weights: .*none.safetensors"),
    "structure": ({"hessian_structure": "diag"}, "--hessian-structure: stored 'kron', now 'diag'"),
    "subset": ({"subset_of_weights": "last_layer"}, "--subset-of-weights: stored 'all', now 'last_layer'"),
    "estimator": ({"estimator": "ef"}, "--estimator: stored 'ggn', now 'ef'"),
    "backend": ({"backend": "curvlinops"}, "--backend: stored 'native', now 'curvlinops'"),
    "model": ({"model": "dist_cases:tiny", "model_args": {"name": "one unit"}}, "--model: stored 'dist_cases:convnet'"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("job", JOBS)
def test_what_a_follow_on_job_is_given_is_the_runs_or_refused_by_name(run, job, case, tmp_path):
    """Also where it would not be used: who gives other weights believes that these are being looked at."""
    given, message = OTHERS[case]
    state = {name: value + 1.0 for name, value in dist_cases.convnet().state_dict().items()}
    save_file(state, tmp_path / "other.safetensors")
    if "weights" in given:
        given = {"weights": str(tmp_path / f"{given['weights']}.safetensors")}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.parts[-2] not in ("jobs", "status")}
    with pytest.raises(SettingsError, match=message):
        JOBS[job](run, **given)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.parts[-2] not in ("jobs", "status")}
    assert {path for path in after if path.is_file()} == {path for path in before if path.is_file()}
    assert all(after[path] == time for path, time in before.items() if path.is_file())


def test_the_runs_own_weights_may_be_given(run, tmp_path):
    save_file(dist_cases.convnet().state_dict(), tmp_path / "own.safetensors")
    given = {"weights": str(tmp_path / "own.safetensors"), "hessian_structure": "kron"}
    assert add(run, "wednesday", **given).promoted and add(run, "tuesday", drop_window="tuesday", **given).promoted


def test_a_drop_adds_no_sums_but_has_the_settings_of_the_runs(run):
    with pytest.raises(SettingsError, match="--batch-size: stored 4, now 7"):
        add(run, "tuesday", drop_window="tuesday", batch_size=7)


def test_a_run_without_a_posterior_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="this run has no posterior yet|where there is no run"):
        add(tmp_path / "nothing", "monday")


def test_a_fit_under_another_name_is_refused(run):
    with pytest.raises(SettingsError, match="--window: got 'sunday', but the fit at .* is that of window 'monday'"):
        fit_inline(config(run, window="sunday"))


def test_fresh_deletes_the_windows_too(run):
    with Job(config(run, fresh=True), laplace_dist.Inline, say=lambda text: None) as job:
        job.open()
    assert Checkpoint(str(run)).list("windows") == []


def test_a_window_that_a_deleted_run_has_left_does_not_count(run):
    store = Checkpoint(str(run))
    left = store.read("windows/tuesday/plan.json")
    with Job(config(run, fresh=True), laplace_dist.Inline, say=lambda text: None) as job:
        job.open()
        store.create("windows/tuesday/plan.json", left)
        assert [window.name for window in windows_of(store, job.plan)] == [job.plan.window_name]


# ------------------------------------------------------------------ command line


def test_the_command_line_says_what_was_decided_and_by_which_figure(run, capsys):
    given = [
        "--checkpoint",
        str(run),
        "--ray-address",
        "inline",
        "--window",
        "wednesday",
        "--data-args",
        "{day: wednesday}",
    ]
    given += ["--model", "dist_cases:convnet", "--data", "test_windows:days", "--batch-size=4", "--segment-size=8"]
    given += ["--gpus-per-worker=0", "--grid-size=5"]
    assert cli.recalibrate_main([*given, "--margin-nll=0", "--margin-ece=0", "--windows=wednesday"]) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("kept the current posterior: ")
    assert cli.recalibrate_main([*given, "--margin-nll=10", "--margin-ece=1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("promoted: ") and all(
        name in out for name in ("MAP", "current", "candidate")
    )
    version = open_json(Checkpoint(str(run)).read(layout.CURRENT), layout.CURRENT)["history"][0]["version"]
    assert cli.recalibrate_main([*given, "--rollback", version]) == 0
    before = Checkpoint(str(run)).read(layout.CURRENT)
    for other in (["--dry-run"], ["--drop-window", "tuesday"]):
        assert cli.recalibrate_main([*given, "--rollback", version, *other]) == 2
        assert f"--rollback: given with {other[0]}" in capsys.readouterr().err
    for other in (["--window", "thursday"], ["--window=thursday"]):
        assert cli.recalibrate_main(["--checkpoint", str(run), "--drop-window", "tuesday", *other]) == 2
        assert "--drop-window: given with --window, which it would not heed" in capsys.readouterr().err
    assert Checkpoint(str(run)).read(layout.CURRENT) == before
    assert cli.recalibrate_main([*given, "--windows", "x"]) == 2
    assert "error: --windows: got 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["fit", "tune", "evaluate"])
@pytest.mark.parametrize(
    "flag", ["--windows=x", "--decay=0.3", "--gate=nll<=0.1", "--margin-nll=1", "--keep-versions=2"]
)
def test_a_flag_that_does_nothing_in_a_job_is_refused_by_name(run, job, flag, capsys):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    assert cli.main(job, ["--checkpoint", str(run), flag]) == 2
    assert f"{flag.partition('=')[0]}: does nothing in this job" in capsys.readouterr().err
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


def test_the_weeks_of_the_demo_are_its_training_split():
    weeks = [digits("train", week=week).tensors for week in (1, 2, 3, 4)]
    for whole, parts in zip(digits("train").tensors, zip(*weeks, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(digits("val", week=2).tensors[0], digits("val").tensors[0])
    with pytest.raises(ValueError, match="week=5 is unknown"):
        digits("train", week=5)


# ------------------------------------------------------------------ passed over, forgetting, idle settings


def test_windows_that_are_passed_over_stand_in_the_decision(run, monkeypatch):
    """With why: one that did not finish, one that a dry run has added, one that was dropped."""
    with monkeypatch.context() as patch:
        patch.setattr(RecalibrationJob, "sum_window", lambda self: (_ for _ in ()).throw(RunFailed("poisoned")))
        with pytest.raises(RunFailed, match="poisoned"):
            add(run, "wednesday", skip_tune=True)
    add(run, "thursday", dry_run=True, skip_tune=True)
    add(run, "tuesday", drop_window="tuesday", skip_tune=True)
    add(run, "friday", skip_tune=True)
    store = Checkpoint(str(run))

    def passed_over(name):
        found = recalibrations.read_decision(store, read_plan(store), name)["passed_over"]
        return {one["window"]: one["why"] for one in found}

    unfinished = {"wednesday": "unfinished", "thursday": "undecided"}
    assert passed_over("without-tuesday") == unfinished
    assert passed_over("friday") == {"tuesday": "left out", **unfinished}
    assert add(run, "thursday", windows="monday,thursday", skip_tune=True).promoted
    assert passed_over("thursday") == {}, "whoever names windows has passed over none"


def test_forgetting_goes_by_position_whatever_the_names_say():
    """Dates with a gap of a year between them are neighbours; so is what was begun later than its name says."""
    names = ["2026-03-01", "2025-01-01", "2026-03-02"]  # in the order in which they were begun
    there = [SimpleNamespace(name=name) for name in names]
    assert [(w.name, x) for w, x in choose(there, "all", 0.5)] == list(zip(names, [0.25, 0.5, 1.0], strict=True))
    assert [x for _, x in choose(there, "2026-03-02,2026-03-01", 0.5)] == [0.5, 1.0]


def shared_file(tmp_path, run):
    given = {"window": "monday", "windows": "last:4", "decay": 0.5, "gate": ["nll<=1"], "skip-evaluate": True}
    given |= {"model": "dist_cases:convnet", "data": "test_windows:days", "data-args": {"day": "monday"}}
    given |= {"checkpoint": str(run), "ray-address": "inline", "batch-size": 4, "segment-size": 8, "skip-tune": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**given, "gpus-per-worker": 0.0, "margin-nll": 10.0}))
    return ["--config", str(tmp_path / "run.yaml")]


def test_one_file_serves_a_fit_and_its_recalibrations_and_says_what_each_does_not_heed(run, tmp_path, capsys):
    file = shared_file(tmp_path, run)
    assert cli.main("fit", file) == 0
    error = capsys.readouterr().err
    assert (
        error
        == "note: windows, decay, margin-nll, gate in --config does nothing in this job, but in jobs/recalibrate.py\n"
    )
    wednesday = [*file, "--window=wednesday", "--data-args={day: wednesday}", "--margin-ece=1"]
    assert cli.recalibrate_main(wednesday) == 0
    assert capsys.readouterr().err == "note: skip-evaluate in --config does nothing in this job, but in the fit's job\n"


@pytest.mark.parametrize("flag", ["--skip-evaluate", "--no-skip-evaluate"])
def test_a_flag_that_does_nothing_in_a_recalibration_is_refused_by_name(run, flag, capsys):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    assert cli.recalibrate_main(["--checkpoint", str(run), flag]) == 2
    assert "--skip-evaluate: does nothing in this job, but in the fit's job" in capsys.readouterr().err
    assert Checkpoint(str(run)).read(layout.CURRENT) == before
