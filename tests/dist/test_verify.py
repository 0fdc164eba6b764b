"""Verifying a run: whole runs pass, what is altered or wrong is named, orphans are found and collected by age."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import dist_cases
import pytest
from forked import Forked

import laplace_dist
from laplace_dist.cli import verify_main
from laplace_dist.errors import SettingsError
from laplace_dist.run import pointer, windows
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.layout import CURRENT, METRICS
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.verify_sums import SumsCheck
from laplace_dist.run.weights import dump_weights
from laplace_dist.storage.sealed_json import seal_json

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"skip_tune": False, "skip_evaluate": False, "ood": ["other"], "segment_size": 24, "batch_size": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the directory of a finished run with everything that a run can have; not to be changed."""
    url = tmp_path_factory.mktemp("finished") / "run"
    dist_cases.run_inline(dist_cases.config(url, **SETTINGS))
    return url


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def keys_named(report):
    return [key for key, _ in report.problems]


def test_a_whole_run_passes_and_is_counted(run, capsys):
    report = laplace_dist.verify(str(run))
    assert (report.problems, report.orphans, report.committed, report.segments) == ([], {}, 2, 2)
    assert report.objects == len(Checkpoint(str(run)).list())
    assert report.versions == [pointer.read_current(Checkpoint(str(run)))["version"]]
    assert verify_main([f"--checkpoint={run}"]) == 0
    assert "every one of them is whole; 2 of 2 segments committed, 1 posterior version(s)" in capsys.readouterr().out


def test_a_run_in_progress_is_whole(run):
    for name in ("posteriors", "tuning", "evaluation", "partials/000001"):
        shutil.rmtree(run / name)
    (run / "partials" / "000001.json").unlink()
    (run / "CURRENT.json").unlink()
    report = laplace_dist.verify(str(run))
    assert (report.problems, report.committed, report.versions) == ([], 1, [])


def test_weights_that_are_altered_or_of_another_model_are_found(run):
    path = run / "weights.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "its tensors do not have the sha256" in dict(laplace_dist.verify(str(run)).problems)["weights.safetensors"]
    model = dist_cases.convnet()
    model[0].bias.data += 1
    path.write_bytes(dump_weights(model))
    assert "of another model" in dict(laplace_dist.verify(str(run)).problems)["weights.safetensors"]


def test_sums_that_are_sealed_but_wrong_are_found(run):
    """Another posterior's factor under a valid manifest: each object is whole, and the sum is not of these partials."""
    store = Checkpoint(str(run))
    (key,) = [key for key in store.list("posteriors", recursive=False) if key.endswith(".json")]
    manifest = open_json(store.read(key), key)
    name = "0.bias" if "0.bias" in manifest["factors"] else sorted(manifest["factors"])[0]
    place = manifest["factors"][name]
    value = store.read_array(place["prefix"], name, place["entry"])
    forged = f"{key.removesuffix('.json')}/forged"
    symmetric = {name} if place["entry"]["packed"] else set()
    place.update(prefix=forged, entry=store.write_arrays(forged, {name: value * 2}, symmetric)[name])
    store.replace(key, seal_json(manifest))
    problems = dict(laplace_dist.verify(str(run)).problems)
    assert "its factors are not the sum of the committed partials" in problems[key]


def test_partials_that_do_not_make_the_current_version_are_found(run):
    store = Checkpoint(str(run))
    key = "partials/000000.json"
    manifest = open_json(store.read(key), key)
    forged = {name: 2 * store.read_array(manifest["prefix"], name, e) for name, e in manifest["arrays"].items()}
    packed = {name for name, entry in manifest["arrays"].items() if entry["packed"]}
    manifest["attempt"] = "forged"
    manifest["prefix"] = "partials/000000/forged"
    manifest["arrays"] = store.write_arrays(manifest["prefix"], forged, packed)
    store.replace(key, seal_json(manifest))
    problems = dict(laplace_dist.verify(str(run)).problems)
    assert list(problems) == ["parts/00000.json"] and "sum of other partials" in problems["parts/00000.json"]


def test_where_there_is_no_run_the_state_refuses(tmp_path, capsys):
    with pytest.raises(SettingsError, match="where there is no run"):
        laplace_dist.verify(str(tmp_path))
    assert verify_main([f"--checkpoint={tmp_path}"]) == 2
    for hours in ("-1", "nan", "inf", "", "a day"):
        assert verify_main([f"--checkpoint={tmp_path}", f"--collect-orphans-older-than={hours}"]) == 2
        assert f"got {hours!r}; expected hours, at least 0" in capsys.readouterr().err
    assert verify_main(["--nonsense=1"]) == 2
    assert "error: unrecognized argument --nonsense" in capsys.readouterr().err


# ------------------------------------------------------------------ orphans


def leave_orphans(run):
    """Leave what crashed attempts leave; return their places."""
    store = Checkpoint(str(run))
    source = next(path for path in (run / "partials" / "000000").iterdir())
    places = [
        "partials/000000/crashed",
        "posteriors/0123456789abcdef/crashed",
        "tuning/x/crashed",
        "evaluation/x/y/crashed",
    ]
    for place in places:
        shutil.copytree(source, run / place)
    (run / "partials" / ".tmp-0123").write_bytes(b"half")
    assert store.exists(f"{places[0]}/zarr.json")
    return sorted([*places, "partials/.tmp-0123"])


def age(run, places, hours):
    for place in places:
        for path in [run / place, *(run / place).rglob("*")]:
            when = path.stat().st_mtime - hours * 3600
            os.utime(path, (when, when))


def test_orphans_are_reported_and_only_old_ones_collected(run):
    before = {key: Checkpoint(str(run)).read(key) for key in Checkpoint(str(run)).list()}
    places = leave_orphans(run)
    report = laplace_dist.verify(str(run))
    assert (sorted(report.orphans), report.collected, report.ok) == (places, [], True)
    age(run, places[:3], 5)
    report = laplace_dist.verify(str(run), collect_orphans_older_than=4)
    assert sorted(report.collected) == places[:3]
    assert sorted(laplace_dist.verify(str(run)).orphans) == places[3:]
    laplace_dist.verify(str(run), collect_orphans_older_than=0)
    assert {key: Checkpoint(str(run)).read(key) for key in Checkpoint(str(run)).list()} == before
    assert not (run / "partials" / ".tmp-0123").exists()


def test_an_attempt_committed_while_verifying_is_not_collected(run, monkeypatch):
    """Its arrays were listed, its manifest came after the listing: it is named by the time of the deletion."""
    store = Checkpoint(str(run))
    key = "partials/000001.json"
    manifest = store.read(key)
    store.delete_tree(key)
    modified = Checkpoint.modified

    def then_commit(self):
        times = modified(self)
        Checkpoint(str(run)).create(key, manifest)
        return times

    monkeypatch.setattr(Checkpoint, "modified", then_commit)
    report = laplace_dist.verify(str(run), collect_orphans_older_than=0)
    assert report.collected == []
    kept = open_json(manifest, key)
    assert store.read_array(kept["prefix"], "00000", kept["arrays"]["00000"]).any()


def test_a_job_that_finishes_while_verifying_raises_no_alarm(finished, tmp_path, monkeypatch):
    """Its posterior version, tuning, evaluation and pointers come after the listing, or the listing met half of them."""
    whole = Checkpoint(str(finished))
    late = [
        key
        for key in whole.list()
        if key.split("/")[0] in ("parts", "window.json", "posteriors", "tuning", "evaluation", "CURRENT.json")
    ]
    shards = [key for key in late if key.count("/") == 2 and key.endswith(".json")]
    modified = Checkpoint.modified
    for number, unlisted in enumerate((late, [k for k in late if k not in (CURRENT, METRICS)], [CURRENT], shards)):
        run = Path(shutil.copytree(finished, tmp_path / str(number)))
        for key in unlisted:
            (run / key).unlink()

        def then_finish(self, run=run):
            times = modified(self)
            for path in finished.rglob("*"):
                if path.is_file() and not (run / path.relative_to(finished)).exists():
                    (run / path.relative_to(finished)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, run / path.relative_to(finished))
            return times

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "modified", then_finish)
            report = laplace_dist.verify(str(run))
        assert (report.problems, report.orphans) == ([], {}), unlisted
        assert laplace_dist.verify(str(run)).versions


@pytest.mark.parametrize("shallow", [False, True])
def test_partials_that_a_recalibration_drops_while_verifying_raise_no_alarm(run, monkeypatch, shallow):
    """They were listed, the window said that they are there, and they are gone when they are to be read."""
    store, agreement = Checkpoint(str(run)), SumsCheck._agreement
    plan = read_plan(store)

    def drop_first(self):
        windows.drop_partials(store, plan)
        agreement(self)

    monkeypatch.setattr(SumsCheck, "_agreement", drop_first)
    report = laplace_dist.verify(str(run), shallow=shallow)
    assert report.problems == [] and report.versions and not store.list("partials")


def test_what_is_lost_while_verifying_is_found_though_it_is_checked_again(run, monkeypatch):
    modified, listed = Checkpoint.modified, []

    def then_lose(self):
        listed.append(modified(self))
        shutil.rmtree(run / "partials" / "000001", ignore_errors=True)
        return listed[-1]

    monkeypatch.setattr(Checkpoint, "modified", then_lose)
    report = laplace_dist.verify(str(run))
    assert len(listed) == 2 and any(key.startswith("partials/000001/") for key in keys_named(report))


def test_an_evaluation_that_ends_while_verifying_is_no_alteration(run, monkeypatch):
    """Other metrics are shown by the time they are read, and what they repeat was not listed."""
    modified, config = Checkpoint.modified, dist_cases.config(run, **{**SETTINGS, "seed": 7})

    def then_evaluate(self):
        times = modified(self)
        with dist_cases.inline_job(config) as job:
            job.evaluate(job.current_version(), None)
        return times

    before = Checkpoint(str(run)).read(METRICS)
    monkeypatch.setattr(Checkpoint, "modified", then_evaluate)
    assert laplace_dist.verify(str(run)).problems == []
    assert Checkpoint(str(run)).read(METRICS) != before


def test_what_a_manifest_of_the_first_listing_names_is_kept_though_the_second_one_misses_it(run, monkeypatch):
    """The manifests are listed twice, and each listing counts."""
    before = Checkpoint(str(run)).list()
    listing = Checkpoint.list

    def incomplete(self, prefix="", **options):
        return [key for key in listing(self, prefix, **options) if not key.startswith("partials/")]

    monkeypatch.setattr(Checkpoint, "list", incomplete)
    report = laplace_dist.verify(str(run), collect_orphans_older_than=0)
    monkeypatch.undo()
    assert (report.orphans, report.collected) == ({}, [])
    assert Checkpoint(str(run)).list() == before


def test_nothing_is_collected_while_a_manifest_cannot_be_read(run):
    (run / "partials" / "000001.json").write_bytes(b"{")
    report = laplace_dist.verify(str(run), collect_orphans_older_than=0)
    assert report.collected == []
    assert report.orphans
    assert "nothing was collected" in dict(report.problems)["orphans"]


def test_the_job_prints_what_is_bad_object_by_object(run, environment):
    chunk = next(path for path in (run / "partials" / "000001").rglob("c/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    leave_orphans(run)
    given = [f"--checkpoint={run}", "--collect-orphans-older-than=0"]
    done = Forked(ROOT / "jobs" / "verify.py", given, environment)
    out, err = done.communicate()
    assert done.returncode == 1
    assert "Traceback" not in err
    lines = out.splitlines()
    bad = [line for line in lines if line.startswith("bad ")]
    assert len(bad) == 1 and str(chunk.relative_to(run)) in bad[0] and "recomputes that segment" in bad[0]
    assert sum(line.startswith("deleted ") for line in lines) == 5
    assert "1 problem(s)" in lines[-1]


# ------------------------------------------------------------------ less than all, and more


def test_a_shallow_verification_reads_no_array_and_still_misses_nothing_that_is_gone(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_array", None)  # calling it would be an error
        assert laplace_dist.verify(str(run), shallow=True).ok
    assert verify_main([f"--checkpoint={run}", "--shallow"]) == 0
    for folder in ("partials", "parts", "posteriors", "tuning", "evaluation"):
        for place in [path for path in (run / folder).rglob("c") if path.is_dir()][:2]:
            name = str(place.relative_to(run).parent)
            kept = place.rename(run.parent / "kept")
            assert name in dict(laplace_dist.verify(str(run), shallow=True).problems), name
            kept.rename(place)
    assert laplace_dist.verify(str(run), shallow=True).ok
    (run / "partials" / "000001.json").write_bytes(b"{")
    assert verify_main([f"--checkpoint={run}", "--shallow"]) == 1
    assert "partials/000001.json" in capsys.readouterr().out


def test_data_that_are_not_those_of_a_segment_are_found_segment_by_segment(run, monkeypatch, capsys):
    assert verify_main([f"--checkpoint={run}", "--data"]) == 0
    tensors = dist_cases.tensors

    def changed(split, dtype="float32"):
        x, y = tensors(split, dtype)
        x[30] += 1e-3
        return x, y

    monkeypatch.setattr(dist_cases, "tensors", changed)
    assert laplace_dist.verify(str(run)).ok, "whose data are not looked at"
    report = laplace_dist.verify(str(run), data=dist_cases.blobs("train"))
    assert [key for key, _ in report.problems] == ["partials/000001.json"]
    assert "computed from other data than the training split gives now" in report.problems[0][1]
    assert verify_main([f"--checkpoint={run}", "--data"]) == 1
    assert "segment 000001 (examples 24 to 43)" in capsys.readouterr().out
