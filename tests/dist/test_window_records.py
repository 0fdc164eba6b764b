"""What stays of a window when its partials go: what was read and where it was computed, and that it is whole without them."""

from __future__ import annotations

import shutil

import pytest
import torch
import window_cases
from torch.utils.data import TensorDataset
from window_cases import add, config, fit_inline

import laplace_dist
from laplace_dist.cli import verify_main
from laplace_dist.execution.inline import InlinePool
from laplace_dist.recalibration import RecalibrationJob
from laplace_dist.run import layout, windows
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.sealed_json import seal_json


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with two windows, whose partials are dropped, and a third whose partials are kept; tests copy it."""
    place = tmp_path_factory.mktemp("records") / "run"
    fit_inline(config(place, window="monday", skip_tune=True))
    add(place, "tuesday", skip_tune=True)
    add(place, "wednesday", skip_tune=True, keep_partials=True)
    return place


@pytest.fixture
def run(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "run")


def window_of(place, name):
    store = Checkpoint(str(place))
    store = store if name == "monday" else store.under(f"windows/{name}")
    return store, open_json(store.read(layout.WINDOW), layout.WINDOW), read_plan(store)


def rewrite(place, name, change):
    """Seal a window's manifest again, changed."""
    store, manifest, _ = window_of(place, name)
    change(manifest)
    store.replace(layout.WINDOW, seal_json(manifest))


# ------------------------------------------------------------------ where it was computed


def test_the_environments_of_all_windows_are_counted_segment_by_segment(run):
    assert [bool(window_of(run, name)[0].list("partials")) for name in ("monday", "tuesday", "wednesday")] == [
        *(False, False, True)
    ]
    for name, version in (("monday", "first"), ("tuesday", "second")):
        rewrite(run, name, lambda m, v=version: m["read"]["environments"][0].update(torch=v))
    report = laplace_dist.verify(str(run))
    counted = [
        sum(count for kind, count in report.environments.items() if f"torch {version}" in kind)
        for version in ("first", "second")
    ]
    assert counted == [len(window_of(run, name)[2].segments) for name in ("monday", "tuesday")] and report.ok
    assert (report.committed, report.segments) == (6, 6)


def test_what_is_kept_is_what_the_partials_said(run):
    _, manifest, plan = window_of(run, "wednesday")
    store = window_of(run, "wednesday")[0]
    said = [open_json(store.read(key := layout.partial_key(s.id)), key) for s in plan.segments]
    assert manifest["read"]["data_sha256"] == [one["data_sha256"] for one in said]
    assert [manifest["read"]["environments"][i] for i in manifest["read"]["made"]] == [m["environment"] for m in said]


@pytest.mark.parametrize("field", ["data_sha256", "environments"])
def test_a_sum_that_says_of_its_partials_what_they_do_not_is_named(run, field):
    def forge(manifest):
        if field == "data_sha256":
            manifest["read"][field][1] = "0" * 64
        else:
            manifest["read"][field][0]["torch"] = "0"

    rewrite(run, "wednesday", forge)
    (problem,) = laplace_dist.verify(str(run)).problems
    assert problem[0] == "windows/wednesday/window.json" and "does not say of its partials what they say" in problem[1]


def test_a_sum_that_does_not_speak_of_every_segment_is_refused(run):
    def cut(manifest):
        manifest["read"]["made"].pop()
        manifest["read"]["data_sha256"].pop()

    rewrite(run, "tuesday", cut)
    assert "windows/tuesday/window.json" in dict(laplace_dist.verify(str(run)).problems)


# ------------------------------------------------------------------ what was read


def test_the_data_of_every_window_are_compared_whether_its_partials_are_there_or_not(run, capsys, monkeypatch):
    assert verify_main([f"--checkpoint={run}", "--data"]) == 0 and "not compared" not in capsys.readouterr().out
    monkeypatch.setattr(window_cases, "days", lambda split, day, real=window_cases.days: altered(real, split, day))
    assert verify_main([f"--checkpoint={run}", "--data"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad")]
    assert [line.split(":")[0].split()[1] for line in bad] == [
        "windows/tuesday/window.json",
        "windows/wednesday/partials/000001.json",
    ]
    assert all("segment 000001 (examples 8 to 15) of window" in line for line in bad)
    assert "--drop-window tuesday" in bad[0]


def altered(real, split, day):
    """Return the days' data, in which example 13 of tuesday and of wednesday is another one."""
    x, y = (tensor.clone() for tensor in real(split, day).tensors)
    if split == "train" and day != "monday":
        x[13] += 1
    return TensorDataset(x, y)


def test_a_pool_and_a_mapping_give_the_same(run, monkeypatch):
    workers = config(run)
    assert laplace_dist.verify(str(run), executor=laplace_dist.Inline, workers=workers, data=True).notes == []
    real = window_cases.days
    monkeypatch.setattr(window_cases, "days", lambda split, day: altered(real, split, day))
    pooled = laplace_dist.verify(str(run), executor=laplace_dist.Inline, workers=workers, data=True)
    mapped = laplace_dist.verify(
        str(run), data={day: altered(real, "train", day) for day in ("monday", "tuesday", "wednesday")}
    )
    assert pooled.problems == mapped.problems and len(mapped.problems) == 2 and pooled.notes == mapped.notes == []


def test_what_is_not_compared_is_said_by_name(run):
    report = laplace_dist.verify(str(run), data=window_cases.days("train", "monday"))
    assert report.ok and [key for key, _ in report.notes] == ["windows/tuesday", "windows/wednesday"]
    assert "only those of the first window were given" in report.notes[0][1]


def test_a_split_that_is_shorter_now_is_named(run):
    short = {"monday": torch.utils.data.Subset(window_cases.days("train", "monday"), range(40))}
    report = laplace_dist.verify(str(run), data=short)
    assert [text for _, text in report.problems] == [
        "segment 000005 (examples 40 to 43) of window monday: the training split has 40 examples now"
    ]


def test_a_window_of_an_older_version_is_a_note_and_no_error(run, capsys):
    """It kept neither what was read, nor which settings name its data."""
    rewrite(run, "tuesday", lambda m: [m.pop(name) for name in ("read", "examples", "dropped")])
    (run / "windows/tuesday/config.yaml").unlink()
    report = laplace_dist.verify(str(run))
    assert report.ok and [key for key, _ in report.notes] == ["windows/tuesday/window.json"]
    assert "does not say where its partials were made" in report.notes[0][1]
    assert verify_main([f"--checkpoint={run}", "--data"]) == 0
    assert "the data of window tuesday were not compared: windows/tuesday/config.yaml is not" in capsys.readouterr().out
    given = {day: window_cases.days("train", day) for day in ("monday", "tuesday", "wednesday")}
    notes = [text for _, text in laplace_dist.verify(str(run), data=given).notes]
    assert any("the data of 3 segment(s) of window tuesday were not compared: an older" in text for text in notes)
    assert add(run, "thursday", skip_tune=True).promoted


def test_settings_of_a_window_that_were_altered_are_named(run):
    path = run / "windows/tuesday/config.yaml"
    path.write_text(path.read_text().replace("day: tuesday", "day: monday"))
    assert "windows/tuesday/config.yaml" in dict(laplace_dist.verify(str(run)).problems)


# ------------------------------------------------------------------ dropping


def test_a_run_whose_partials_are_dropped_is_whole_and_goes_on(run, monkeypatch):
    assert laplace_dist.status(str(run))["complete"] and laplace_dist.verify(str(run)).ok
    assert add(run, "thursday", skip_tune=True).promoted
    assert not [key for key in Checkpoint(str(run)).list() if "partials/" in key], "those that were kept go too"
    monkeypatch.setattr(InlinePool, "submit", lambda *_: pytest.fail("a task was submitted"))
    before = Checkpoint(str(run)).read(layout.CURRENT)
    fit_inline(config(run, window="monday", skip_tune=True, skip_evaluate=True, skip_report=True))
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


def test_partials_of_before_are_remembered_before_they_go(tmp_path):
    place = tmp_path / "run"
    fit_inline(config(place, window="monday", skip_tune=True))
    _, manifest, _ = window_of(place, "monday")
    wanted = {name: manifest[name] for name in ("read", "examples")}
    rewrite(place, "monday", lambda m: [m.pop(name) for name in wanted])
    add(place, "tuesday", skip_tune=True)
    _, manifest, _ = window_of(place, "monday")
    assert manifest["dropped"] and {name: manifest[name] for name in wanted} == wanted


@pytest.mark.parametrize("part", ["nothing", "arrays", "manifests"])
def test_killed_while_partials_go_nothing_is_missing_and_the_next_one_finishes(tmp_path, monkeypatch, part):
    place = tmp_path / "run"
    fit_inline(config(place, window="monday", skip_tune=True))
    real = windows.delete_owned

    def deadly(store, folder):
        for key in store.list(folder) if part != "nothing" and store.url == str(place) else ():
            if key.endswith(".json") == (part == "manifests") and "/zarr" not in key:
                store.delete_tree(key)
        if store.url == str(place):
            raise KeyboardInterrupt
        real(store, folder)

    monkeypatch.setattr(windows, "delete_owned", deadly)
    with pytest.raises(KeyboardInterrupt):
        add(place, "tuesday", skip_tune=True)
    monkeypatch.setattr(windows, "delete_owned", real)
    report = laplace_dist.verify(str(place))
    assert report.ok and report.committed == report.segments
    read = []
    monkeypatch.setattr(RecalibrationJob, "map", lambda self: read.append("map"))
    fit_inline(config(place, window="monday", skip_tune=True))
    assert add(place, "tuesday", skip_tune=True).promoted and read == []
    assert not Checkpoint(str(place)).list("partials")


def test_partials_stay_beside_another_job_in_a_dry_run_and_if_they_are_to(tmp_path):
    place = tmp_path / "run"
    fit_inline(config(place, window="monday", skip_tune=True))
    store = Checkpoint(str(place))
    before = set(store.list("partials"))
    add(place, "tuesday", dry_run=True, skip_tune=True)
    with RecalibrationJob(config(place, window="other"), laplace_dist.Inline) as job:
        job.session.lease.show()
        add(place, "wednesday", skip_tune=True)
    add(place, "thursday", keep_partials=True, skip_tune=True)
    assert set(store.list("partials")) == before
    (place / "partials" / "notes.txt").write_text("mine")
    add(place, "friday", skip_tune=True)
    assert store.list("partials") == ["partials/notes.txt"], "what is a user's stays"


def test_both_passes_of_a_fit_are_dropped_and_their_basis_still_serves(tmp_path):
    place = tmp_path / "run"
    fit_inline(config(place, window="monday", hessian_structure="ekfac", skip_tune=True))
    whole = window_cases.factors(place)
    assert add(place, "tuesday", hessian_structure="ekfac", skip_tune=True).promoted
    store = Checkpoint(str(place))
    assert not [key for key in store.list() if "partials/" in key]
    given = {day: window_cases.days("train", day) for day in ("monday", "tuesday")}
    report = laplace_dist.verify(str(place), data=given)
    assert (report.problems, report.notes) == ([], []) and laplace_dist.status(str(place))["complete"]
    fit_inline(config(place, window="monday", hessian_structure="ekfac", skip_tune=True))
    found = add(place, "tuesday", hessian_structure="ekfac", drop_window="tuesday", skip_tune=True)
    assert found.promoted and window_cases.same(whole, window_cases.factors(place))
