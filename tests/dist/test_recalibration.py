"""What a recalibration does beside promoting: thresholds, the watch for drift, alerts, and what it keeps."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import test_windows
import torch
from test_windows import config, fit_inline
from torch.utils.data import TensorDataset

import laplace_dist
from laplace_dist import cli
from laplace_dist.config import gates
from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.recalibration import RecalibrationJob, recalibrate, rollback
from laplace_dist.report import alert
from laplace_dist.run import decompositions, layout, pointer, recalibrations, retention
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.combination import windows_of
from laplace_dist.run.ownership import read_plan

N = 200  # fresh examples of a day
SIZES = {"batch_size": 24, "segment_size": 24}


def fresh(split: str, day: int, shift: float = 0.0, share: float = 1 / 3, change: bool = False) -> TensorDataset:
    """Return a day's training data, and fresh examples of its own: shifted, with other shares of labels, or with other labels."""
    generator = torch.Generator().manual_seed(1000 * day + ["train", "val", "test", "recent"].index(split))
    n = 24 if split == "train" else N
    x = torch.randn(n, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2)
    if change:
        with torch.no_grad():  # what the model thinks least likely
            y = test_windows.dist_cases.convnet()(x).argmin(1)
    if share != 1 / 3:
        kept = torch.multinomial(torch.where(y == 0, share, (1 - share) / 2), n, replacement=True, generator=generator)
        x, y = x[kept], y[kept]
    return TensorDataset(x + shift, y)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with a fit and one recalibration; tests copy it."""
    place = tmp_path_factory.mktemp("recalibration") / "run"
    fit_inline(config(place, data="test_recalibration:fresh", data_args={"day": 0}, window="day-0", **SIZES))
    day(place, 1)
    return place


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def day(place, number, **changes):
    data = {name: changes.pop(name) for name in ("shift", "share", "change") if name in changes}
    extra = {name: changes.pop(name) for name in ("dry_run", "drop_window") if name in changes}
    given = {"data": "test_recalibration:fresh", "data_args": {"day": number, **data}, "window": f"day-{number}"}
    return recalibrate(config(place, **{**SIZES, **given, **changes}), laplace_dist.Inline, **extra)


def decision(place, name):
    store = Checkpoint(str(place))
    return recalibrations.read_decision(store, read_plan(store), name)


# ------------------------------------------------------------------ thresholds

MET = {
    "nll<=-0.09": True,
    "nll <= -0.11": False,
    "accuracy>=-.2": True,
    "accuracy>=0": False,
    "ece<=4.1e-2": True,
    "candidate:accuracy>=0.8": True,
    "candidate:accuracy<=0.79": False,
    "candidate:ece<=+0.05": True,
}
FIGURES = {"nll": 0.5, "accuracy": 0.8, "ece": 0.05}


@pytest.mark.parametrize("text", MET)
def test_a_threshold_bounds_a_difference_or_the_candidates_own_figure(text):
    (found,) = gates.check([text], FIGURES, {"nll": 0.6, "accuracy": 0.9, "ece": 0.01})
    assert found["met"] is MET[text] and found["gate"] == text


@pytest.mark.parametrize("gate, met", [("nll<=10", True), ("candidate:accuracy>=1.5", False)])
def test_a_threshold_is_asked_beside_the_comparison(run, gate, met):
    store = Checkpoint(str(run))
    before = store.read(layout.CURRENT)
    found = day(run, 2, gate=["brier<=9", gate])
    assert found.promoted == met and (store.read(layout.CURRENT) == before) != met
    shown = decision(run, "day-2")["gates"]
    assert [g["met"] for g in shown] == [True, met]
    if not met:
        own = found.metrics["candidate"]["accuracy"]
        assert found.why == f"--gate {gate}: the candidate's own figure is {own:+.4f}: it is not met"
    else:
        assert shown[1]["value"] == found.metrics["candidate"]["nll"] - found.metrics["current"]["nll"]


def test_the_comparison_decides_before_the_thresholds(run):
    found = day(run, 2, gate=["nll<=-10"], margin_nll=0.0, margin_ece=0.0)
    assert not found.promoted and "not shown to be no worse" in found.why


@pytest.mark.parametrize("text", ["nll<0.005", "nll", "<=3", "nll<=much", "nll<=nan", "nll<=1e999", "mean:nll<=1", ""])
def test_a_threshold_that_says_nothing_is_refused_with_what_is_accepted(run, text, capsys):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    status = cli.recalibrate_main(["--checkpoint", str(run), "--gate", "nll<=0.1", "--gate", text])
    error = capsys.readouterr().err
    assert status == 2 and "--gate" in error and repr(text) in error and "METRIC<=NUMBER" in error
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


def test_a_threshold_on_a_figure_that_there_is_not_is_refused(run):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    with pytest.raises(
        SettingsError, match=r"--gate: got 'rmse<=1', but there is no figure 'rmse'; there are accuracy"
    ):
        day(run, 2, gate=["rmse<=1"])
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


# ------------------------------------------------------------------ drift


def test_nothing_is_noticed_while_nothing_changes(run):
    for number in range(2, 6):
        found = day(run, number)
        shown = decision(run, f"day-{number}")["drift"]
        assert found.noticed == () and shown["noticed"] == {}
        assert set(shown["streams"]) == {"entropy", "features", "nll", "labels"} and shown["false_alarms"] == 0.05
        assert shown["reference"]["number"] == number, "every promotion is a new reference"
        assert all(stream["looks"] == 1 for stream in shown["streams"].values())
        change = shown["changes"]["nll"]
        assert change["change"] == pytest.approx(change["now"] - change["before"])
        assert change["now"] == pytest.approx(found.metrics["current"]["nll"], abs=1e-9)


def test_the_first_look_compares_with_what_the_fit_has_evaluated(kept):
    shown = decision(kept, "day-1")["drift"]
    first = pointer.read_current(Checkpoint(str(kept)))["history"][0]["version"]
    assert shown["reference"]["number"] == 1 and shown["reference"]["version"] == first and not shown["passed_over"]


@pytest.mark.parametrize(
    "data, streams",
    [({"shift": 1.0}, {"features"}), ({"share": 0.9}, {"labels"}), ({"change": True}, {"nll"})],
    ids=["other inputs", "other shares of labels", "other labels for the same inputs"],
)
def test_drift_is_noticed_by_the_stream_that_shows_it_and_stays_so(run, data, streams, capsys):
    found = day(run, 2, **data, gate=["nll<=-10"])
    assert streams <= set(found.noticed), decision(run, "day-2")["drift"]["streams"]
    assert "is not what it was when the current posterior was accepted" in capsys.readouterr().out
    day(run, 3, gate=["nll<=-10"])
    shown = decision(run, "day-3")["drift"]
    assert all(shown["noticed"][name] == "day-2" for name in streams)
    assert day(run, 4).promoted and day(run, 5).noticed == (), "a promotion is a new reference"


def test_a_window_is_looked_at_once(run):
    state = layout.DRIFT
    store = Checkpoint(str(run))
    day(run, 2, gate=["nll<=-10"])
    before = store.read(state)
    day(run, 2, gate=["nll<=-11"])
    assert store.read(state) == before
    day(run, 2, gate=["nll<=-12"], dry_run=True)
    day(run, 3, dry_run=True)
    assert store.read(state) == before, "a dry run is no look"


def test_examples_that_were_seen_are_no_new_evidence(run):
    day(run, 2, gate=["nll<=-10"], data="test_recalibration:old_examples")
    shown = decision(run, "day-2")["drift"]
    assert set(shown["passed_over"]) == {"entropy", "features", "nll", "labels"}
    assert {stream["looks"] for stream in shown["streams"].values()} == {0} and "changes" not in shown


def old_examples(split: str, day: int) -> TensorDataset:
    """Return fresh training data, and the test examples of the day before."""
    return fresh(split, day - 1 if split == "test" else day)


def test_examples_without_labels_are_watched_and_what_they_will_cost_is_estimated(run):
    found = day(run, 2, data="test_recalibration:without_labels", unlabelled="recent", gate=["nll<=-10"])
    shown = decision(run, "day-2")["drift"]
    assert "features" in found.noticed and not {"nll", "labels"} & set(found.noticed)
    assert set(shown["estimated_without_labels"]) == {"test", "recent"}
    assert set(shown["estimated_without_labels"]["recent"]) == {"accuracy_atc", "accuracy_doc", "nll_doc"}
    assert math.isclose(sum(shown["labels"]["estimated_without_labels"]), 1)
    assert "ood_auroc/recent" not in found.metrics["current"]


def without_labels(split: str, day: int) -> TensorDataset:
    """Return recent examples that are shifted, with nonsense for labels, beside test examples that are not."""
    x, y = fresh(split, day, 1.0 if split == "recent" else 0.0).tensors
    return TensorDataset(x, y if split != "recent" else torch.zeros_like(y))


@pytest.mark.parametrize("name", ["test", "a b", ""])
def test_a_name_that_no_unlabelled_split_can_have_is_refused(run, name):
    with pytest.raises(SettingsError, match=f"--unlabelled: got {name!r}"):
        day(run, 2, unlabelled=name)


def test_spectra_of_the_new_window_are_compared_with_the_current_posterior(run):
    day(run, 2)
    same = decision(run, "day-2")["drift"]["spectra"]["relative_distance"]
    day(run, 3, shift=3.0)
    other = decision(run, "day-3")["drift"]["spectra"]["relative_distance"]
    assert set(same) == set(read_plan(Checkpoint(str(run))).spec["factors"])
    assert other["0.weight/A"] > 5 * same["0.weight/A"]


def test_a_regression_is_watched_too(tmp_path):
    given = {"data": "test_recalibration:numbers", "likelihood": "regression", "margin_nll": 10.0, **SIZES}
    fit_inline(config(tmp_path / "run", window="0", **{**given, "data_args": {"day": 0}}))
    for number, shift in ((1, 0.0), (2, 4.0)):
        recalibrate(config(tmp_path / "run", window=f"day-{number}", **given, data_args={"day": number, "shift": shift}),
                    laplace_dist.Inline)  # fmt: skip
    shown = decision(tmp_path / "run", "day-2")["drift"]
    assert set(shown["streams"]) == {"entropy", "features", "nll"} and "features" in shown["noticed"]
    assert set(shown["changes"]) == {"nll"} and "labels" not in shown and "estimated_without_labels" not in shown


def numbers(split: str, day: int, shift: float = 0.0) -> TensorDataset:
    """Return a regression's data."""
    x, _ = fresh(split, day).tensors
    return TensorDataset(x + shift, torch.stack([x.sum((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 0, 0]], 1))


# ------------------------------------------------------------------ alerts


def command(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def test_an_alert_is_given_the_record_when_something_has_drifted(run, tmp_path, capsys):
    told = command(f"import sys; open({str(tmp_path / 'told')!r}, 'a').write(sys.stdin.read())")
    day(run, 2, gate=["nll<=-10"], alert_cmd=told)
    assert not (tmp_path / "told").exists(), "nothing has drifted"
    day(run, 3, shift=1.0, gate=["nll<=-10"], alert_cmd=told)
    record = json.loads((tmp_path / "told").read_text())
    assert record["window"] == "day-3" and record["checkpoint"] == str(run)
    assert {name: record[name] for name in ("drift", "promoted", "why")} == {
        name: decision(run, "day-3")[name] for name in ("drift", "promoted", "why")
    }
    assert "--alert-cmd: " in capsys.readouterr().out
    assert "alert" not in (run / layout.CONFIG).read_text()


@pytest.mark.parametrize(
    "cmd, why",
    [
        (command("import sys; sys.exit('no such pager')"), "ended with status 1: no such pager"),
        ("/no/such/command", "was not told: .*No such file"),
        (command("import time; time.sleep(60)"), "did not end within 0.5 s"),
    ],
)
def test_an_alert_that_fails_is_reported_and_changes_nothing(run, cmd, why, capsys, monkeypatch):
    monkeypatch.setattr(alert.send, "__defaults__", (0.5,))
    wanted = day(run, 2, shift=1.0)
    current = Checkpoint(str(run)).read(layout.CURRENT)
    again = run.parent / "again"
    shutil.copytree(run, again)
    rollback(str(again), pointer.read_current(Checkpoint(str(run)))["history"][-2]["version"])
    found = day(again, 2, shift=1.0, alert_cmd=cmd)
    assert re.search(why, capsys.readouterr().out)
    assert found.promoted and found.version == wanted.version and Checkpoint(str(run)).read(layout.CURRENT) == current


@pytest.mark.parametrize("cmd, message", [("mail 'ops", "cannot be split"), ("  ", "holds no word")])
def test_an_alert_command_that_is_none_is_refused_before_anything_is_done(run, cmd, message):
    before = Checkpoint(str(run)).list()
    with pytest.raises(SettingsError, match=f"--alert-cmd: {message}"):
        day(run, 2, alert_cmd=cmd)
    assert Checkpoint(str(run)).list() == before


# ------------------------------------------------------------------ what is kept


def test_only_what_kept_versions_need_stays(run):
    store = Checkpoint(str(run))
    for number in (2, 3, 4, 5):
        day(run, number, keep_versions=2, windows="last:2")
    history = pointer.read_current(store)["history"]
    last = [entry["version"] for entry in history][-2:]
    assert [entry.get("collected", False) for entry in history] == [True] * 4 + [False] * 2
    assert {key.split("/")[1][:16] for key in store.list("posteriors")} == set(last)
    assert {key.split("/")[1][:16] for key in store.list("tuning")} == set(last)
    assert {key.split("/")[1][:16] for key in store.list("evaluation")} - {"metrics.json"} == set(last)
    assert {key.split("/")[1] for key in store.list("windows")} == {"day-3", "day-4", "day-5"}
    report = laplace_dist.verify(str(run))
    assert (report.problems, report.orphans) == ([], {}) and sorted(report.versions) == sorted(last)
    rollback(str(run), last[0])
    assert laplace_dist.load_posterior(str(run), test_windows.dist_cases.convnet()).n_data == 48
    day(run, 6, keep_versions=1, windows="last:2", gate=["nll<=-10"])
    assert not store.exists(layout.METRICS), "it repeated the evaluation of a version that is gone"
    report = laplace_dist.verify(str(run))
    assert (report.problems, report.orphans) == ([], {})


def test_decompositions_go_with_their_version(run, monkeypatch):
    monkeypatch.setattr(decompositions, "WORTH", 1)
    for number in (1, 2, 3):
        day(run, number, keep_versions=2)
    kept = {path.stem for path in Path(run, "posteriors").glob("*.json")}
    assert {path.name for path in Path(run, "decompositions").iterdir()} == kept and len(kept) == 2
    assert laplace_dist.verify(str(run)).ok


def test_a_candidate_that_was_kept_can_be_looked_at_until_the_next_recalibration(run):
    found = day(run, 2, gate=["nll<=-10"], keep_versions=1)
    model = test_windows.dist_cases.convnet()
    assert laplace_dist.load_posterior(str(run), model, version=found.version).n_data == 72
    day(run, 3, gate=["nll<=-10"], keep_versions=1, windows="day-0,day-3")
    with pytest.raises(CheckpointError, match=found.version):
        laplace_dist.load_posterior(str(run), model, version=found.version)


def test_a_version_that_was_collected_is_refused_by_name(run):
    store = Checkpoint(str(run))
    for number in (2, 3):
        day(run, number, keep_versions=1)
    before = store.read(layout.CURRENT)
    first = pointer.read_current(store)["history"][0]["version"]
    with pytest.raises(SettingsError, match=rf"--rollback: got '{first}', which was collected \(--keep-versions\)"):
        rollback(str(run), first)
    with pytest.raises(CheckpointError, match=rf"version {first} of .* was collected \(--keep-versions\)"):
        laplace_dist.load_posterior(str(run), test_windows.dist_cases.convnet(), version=first)
    assert store.read(layout.CURRENT) == before


def test_nothing_is_collected_beside_another_job_or_in_a_dry_run(run, capsys):
    store = Checkpoint(str(run))
    before = {key for key in store.list("posteriors")}
    day(run, 2, keep_versions=1, dry_run=True)
    assert before <= set(store.list("posteriors"))
    with RecalibrationJob(config(run, window="other"), laplace_dist.Inline) as job:
        job.session.lease.show()
        day(run, 2, keep_versions=1)
        assert before <= set(store.list("posteriors"))
        assert "nothing is collected while another job is at work" in capsys.readouterr().out
    day(run, 2, keep_versions=1)  # decided before, and collected now
    assert not before & set(store.list("posteriors"))


def test_a_window_that_is_gone_is_not_begun_again(run):
    for number in (2, 3):
        day(run, number, keep_versions=1, windows="last:1")
    before = Checkpoint(str(run)).read(layout.CURRENT)
    with pytest.raises(SettingsError, match="--window: got 'day-1', which was decided before and whose sum is gone"):
        day(run, 1, windows="last:1")
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


def test_a_window_that_was_dropped_stays_out_until_it_is_named(run):
    assert day(run, 1, drop_window="day-1").promoted
    day(run, 2)
    assert [term["window"] for term in decision(run, "day-2")["windows"]] == ["day-0", "day-2"]
    day(run, 3, windows="last:3", keep_versions=1)
    assert [term["window"] for term in decision(run, "day-3")["windows"]] == ["day-0", "day-2", "day-3"]
    assert not Checkpoint(str(run)).list("windows/day-1"), (
        "what was unlearned is deleted with the versions that knew it"
    )


def test_a_dropped_window_that_is_named_is_in_again(run):
    day(run, 1, drop_window="day-1")
    day(run, 2, windows="day-0,day-1,day-2")
    day(run, 3)
    assert [term["window"] for term in decision(run, "day-3")["windows"]] == ["day-0", "day-1", "day-2", "day-3"]


def test_a_rollback_brings_back_the_windows_of_then(run):
    version = pointer.read_current(Checkpoint(str(run)))["version"]
    day(run, 1, drop_window="day-1")
    rollback(str(run), version)
    day(run, 2)
    assert [term["window"] for term in decision(run, "day-2")["windows"]] == ["day-0", "day-1", "day-2"]


def test_windows_that_somebody_named_are_no_reason_to_delete_others(run):
    day(run, 2, keep_versions=1, windows="day-2")
    store = Checkpoint(str(run))
    assert [window.name for window in windows_of(store, read_plan(store))] == ["day-0", "day-1", "day-2"]


def test_files_of_a_user_are_left_alone(run):
    (run / "windows" / "mine").mkdir(parents=True)
    (run / "windows" / "mine" / "notes.txt").write_text("mine")
    (run / "posteriors" / "notes.txt").write_text("mine")
    for number in (2, 3):
        day(run, number, keep_versions=1, windows="last:1")
    assert (run / "windows/mine/notes.txt").exists() and (run / "posteriors/notes.txt").exists()


def test_a_damaged_version_that_is_to_stay_stops_the_collection(run):
    store = Checkpoint(str(run))
    version = pointer.read_current(store)["history"][-2]["version"]
    before = set(store.list("posteriors"))
    test_windows.damaged(store, layout.version_key(version))
    with pytest.raises(CheckpointError, match=version):
        day(run, 2, keep_versions=3)
    assert before <= set(store.list("posteriors"))


def test_partials_go_once_the_sum_was_read(run, monkeypatch):
    store = Checkpoint(str(run))

    def harmed(place, plan, manifests):
        found = real(place, plan, manifests)
        test_windows.damaged(place, next(key for key in place.list("parts") if key.endswith("c/0")))
        return found

    real = laplace_dist.run.windows.commit_window
    monkeypatch.setattr(laplace_dist.run.windows, "commit_window", harmed)
    with pytest.raises(CheckpointError, match="parts/"):
        day(run, 2)
    assert store.list("windows/day-2/partials")


def test_the_lease_is_looked_at_before_every_deletion(run, monkeypatch):
    store, deleted = Checkpoint(str(run)), []
    real = retention._delete

    def taken_over(place, stem):
        deleted.append(stem)
        real(place, stem)
        store.replace(layout.RECALIBRATION_LEASE, store.read(layout.RECALIBRATION_LEASE).replace(b'"job"', b'"jab"'))

    monkeypatch.setattr(retention, "_delete", taken_over)
    with pytest.raises(CheckpointError, match="lease"):
        day(run, 2, keep_versions=1)
    assert len(deleted) == 1
