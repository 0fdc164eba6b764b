"""What a recalibration asks of a candidate beside the comparison, and what it keeps."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import dist_cases
import pytest
import window_cases
from recalibration_cases import SIZES, begin, day, decision
from rich.console import Console
from window_cases import config

import laplace_dist
from laplace_dist import cli
from laplace_dist.config import gates
from laplace_dist.config.figures import figures
from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.job import Job, tune_posterior
from laplace_dist.recalibration import RecalibrationJob, rollback
from laplace_dist.report.metrics import metrics_table
from laplace_dist.run import decompositions, layout, pointer, retention, tunings
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.combination import windows_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.stages import evaluate, tune, words
from laplace_dist.stages import recalibrate as stage


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with a fit and one recalibration; tests copy it."""
    return begin(tmp_path_factory.mktemp("recalibration") / "run")


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


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


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    """In decisions, thresholds, what tunings say, and the table."""
    nothing, of_map = {"value": -1e-6, "low": -1e-6, "high": 1e-6}, {"nll": -1e-6}
    (failed,) = gates.check(["nll>=1"], {"nll": 0.5 - 1e-6}, {"nll": 0.5})
    shown = io.StringIO()
    Console(file=shown).print(metrics_table({"map": of_map, "laplace": of_map}))
    _, why = stage.decide({"nll": nothing}, {"nll": 0.1}, 1000, 0.95)
    said = [gates.why_not([failed]), *words.passed_over({"nll": nothing}), why, shown.getvalue()]
    assert all("-0.0000" not in text and "0.0000" in text for text in said), said


@pytest.mark.parametrize("level, least", [(0.9, 22), (0.95, 59), (0.99, 459), (0.51, 2)])
def test_so_many_examples_show_the_worst_of_them(level, least):
    """Of so many, and not of one fewer, at least one is among the share of the worst with the probability of the level."""
    assert stage.needed(level) == least
    assert 1 - level**least >= level > 1 - level ** (least - 1)


def test_too_few_fresh_examples_promote_nothing_whatever_they_say(run):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    found = day(run, 2, data="recalibration_cases:few", n=58)
    assert found.why == "58 fresh examples are too few to tell: a promotion at --level 0.95 needs at least 59"
    assert not found.promoted and Checkpoint(str(run)).read(layout.CURRENT) == before
    assert day(run, 2, data="recalibration_cases:few", n=59).promoted


def test_a_decision_holds_for_the_fresh_examples_that_it_was_made_on(run, capsys):
    """Of the same window: more of them are what a candidate that was kept asks for."""
    fewer, more = ({"data": "recalibration_cases:few", "n": n, "gate": ["nll<=-10"]} for n in (100, 150))
    kept = day(run, 2, **fewer)
    assert day(run, 2, **fewer) == kept and "decided before" in capsys.readouterr().out
    again = day(run, 2, **more)
    assert "decided before" not in capsys.readouterr().out
    assert again.version == kept.version and again.metrics["map"] != kept.metrics["map"]


def test_what_is_current_already_is_not_promoted_again(run):
    """It would be a second entry of the history, and another reference for the watch of drift."""
    day(run, 2, data="recalibration_cases:few", n=100)
    before = Checkpoint(str(run)).read(layout.CURRENT)
    found = day(run, 2, data="recalibration_cases:few", n=150)
    assert found.promoted and found.why == "it is what is current already; nothing was changed"
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


@pytest.mark.parametrize(
    "change",
    [
        *({"link_approx": "mc"}, {"pred_type": "nn"}, {"grid_size": 9}, {"prior_range": [1.0, 2.0]}, {"seed": 1}),
        *({"prior_structure": "layerwise"}, {"recalibrate": "both"}, {"tune_method": "marglik"}, {"skip_tune": True}),
        *({"level": 0.9}, {"draws": 200}, {"margin_nll": 0.5}, {"gate": ["nll<=1"]}, {"ood": ["far"]}),
    ],
    ids=str,
)
def test_a_decision_is_of_everything_that_tuning_and_evaluation_depend_on(change):
    one, other = (config("x", **{"skip_tune": False, **some}) for some in ({}, change))
    data = {name: {"sha256": name} for name in ("val", "test")}

    def of(chosen):
        return stage.settings(chosen, data | {name: {"sha256": name} for name in chosen.ood})

    assert of(one) != of(other) and of(one) == of(one)
    names = {*tune.settings(one, data["val"]), *evaluate.settings(one, None, data)} - {"batch_size", "tuning", "data"}
    assert names - set(one.machine("cpu")) - {"method", "temperature"} <= set(of(one))


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


@pytest.mark.parametrize("flag", ["--keep-versions=0", "--keep-versions=two", "--keep-versions=-1"])
def test_a_number_of_versions_that_is_none_is_refused(run, flag, capsys):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    assert cli.recalibrate_main(["--checkpoint", str(run), flag]) == 2
    error = capsys.readouterr().err
    assert "--keep-versions" in error and flag.partition("=")[2] in error
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


def test_a_threshold_on_a_figure_that_there_is_not_is_refused(run):
    before = Checkpoint(str(run)).read(layout.CURRENT)
    with pytest.raises(
        SettingsError, match=r"--gate: got 'rmse<=1', but there is no figure 'rmse'; there are accuracy"
    ):
        day(run, 2, gate=["rmse<=1"])
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


@pytest.mark.parametrize("drop", [None, "day-1"])
def test_a_threshold_on_a_figure_that_there_is_not_is_refused_before_anything_is_done(run, drop):
    folders = ("windows", "posteriors", "evaluation")
    before = [Checkpoint(str(run)).list(folder) for folder in folders]
    with pytest.raises(SettingsError, match=r"--gate: got 'candidate:foo>=1'.*there are accuracy, nll, brier, ece\. "):
        day(run, 2, gate=["nll<=9", "candidate:foo>=1"], drop_window=drop)
    assert [Checkpoint(str(run)).list(folder) for folder in folders] == before


LIKELIHOODS = {
    "classification": ["accuracy", "nll", "brier", "ece", "ood_auroc/far"],
    "regression": ["nll", "rmse", "coverage_90"],
    "laplace.likelihoods:Poisson": ["nll", "rmse"],
    "likelihood_cases:Exponential": ["nll"],  # of the base class
    "likelihood_cases:ignoring": ["accuracy", "nll", "brier", "ece", "ood_auroc/far"],
    "recalibration_cases:TwoScores": [],  # not known before
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_figures_of_a_likelihood_are_known_before_where_they_follow_from_it(tmp_path, likelihood):
    given = config(tmp_path, likelihood=likelihood, ood=["far", "recent"], unlabelled="recent")
    assert figures(given) == LIKELIHOODS[likelihood]


# ------------------------------------------------------------------ what is kept


def test_only_what_kept_versions_need_stays(run):
    store = Checkpoint(str(run))
    for number in (2, 3, 4, 5):
        day(run, number, keep_versions=2, windows="last:2", skip_tune=False)
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
    assert laplace_dist.load_posterior(str(run), dist_cases.convnet()).n_data == 48
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
    model = dist_cases.convnet()
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
        laplace_dist.load_posterior(str(run), dist_cases.convnet(), version=first)
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


@pytest.mark.parametrize("keep", [{}, {"keep_versions": 1, "windows": "last:2"}])
def test_dropping_what_was_dropped_before_is_nothing_to_do(run, caplog, keep):
    """Also after another window has come, and where its sum is gone; two dry runs are no reason either."""
    day(run, 1, drop_window="day-1")
    day(run, 2, **keep)
    before = Checkpoint(str(run)).read(layout.CURRENT)
    with caplog.at_level("INFO", "laplace_dist"):
        assert day(run, 3, drop_window="day-1", dry_run=True, **keep) is None
        assert day(run, 3, drop_window="day-1", **keep) is None
    assert caplog.messages.count("window day-1 was dropped before: nothing to do") == 2
    assert Checkpoint(str(run)).read(layout.CURRENT) == before
    assert (
        day(run, 3, drop_window="day-1", windows="day-0").version
        != pointer.history_of(json.loads(before))[-1]["version"]
    )


def test_the_last_window_cannot_be_dropped(run):
    day(run, 1, drop_window="day-1")
    before = Checkpoint(str(run)).read(layout.CURRENT)
    with pytest.raises(SettingsError, match="--windows: got 'all', and every window there is was dropped; name some"):
        day(run, 1, drop_window="day-0")
    assert Checkpoint(str(run)).read(layout.CURRENT) == before


def test_dropping_heeds_which_windows_count(run):
    day(run, 2)
    day(run, 3)
    day(run, 3, drop_window="day-2", windows="last:2")
    assert [term["window"] for term in decision(run, "without-day-2")["windows"]] == ["day-1", "day-3"]


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
    window_cases.damaged(store, layout.version_key(version))
    with pytest.raises(CheckpointError, match=version):
        day(run, 2, keep_versions=3)
    assert before <= set(store.list("posteriors"))


def test_partials_go_once_the_sum_was_read(run, monkeypatch):
    store = Checkpoint(str(run))

    def harmed(place, plan, manifests):
        found = real(place, plan, manifests)
        window_cases.damaged(place, next(key for key in place.list("parts") if key.endswith("c/0")))
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


# ------------------------------------------------------------------ a tuning beside promotions


def retune(place):
    given = {"data": "recalibration_cases:fresh", "data_args": {"day": 1}, **SIZES, "skip_tune": False}
    return tune_posterior(config(place, **given), laplace_dist.Inline)


def test_a_tuning_of_what_is_not_current_any_more_is_not_put_in_force(run, monkeypatch):
    store, real = Checkpoint(str(run)), Job.choose_prior
    first = pointer.read_current(store)["history"][0]["version"]

    def meanwhile(self, version):
        key = real(self, version)
        rollback(str(run), first)
        return key

    monkeypatch.setattr(Job, "choose_prior", meanwhile)
    with pytest.raises(
        SettingsError, match=f"another job has made version {first} current .* while this one worked on"
    ):
        retune(run)
    assert pointer.read_current(store)["history"][-1]["why"] == "rolled back"


def test_a_fit_job_that_runs_again_after_promotions_changes_nothing(run, capsys):
    """With validation and test data of its own day, on which it would tune the promoted posterior otherwise."""
    day(run, 2, skip_tune=False, skip_evaluate=False)
    store = Checkpoint(str(run))
    before = {
        key: store.read(key) for key in store.list() if key.split("/")[0] not in ("jobs", "status", "config.yaml")
    }
    given = {"data": "recalibration_cases:fresh", "data_args": {"day": 0}, "window": "day-0", **SIZES}
    found = window_cases.fit_inline(config(run, **{**given, "skip_tune": False}))
    assert {key: store.read(key) for key in before} == before
    assert {key for key in store.list() if key.split("/")[0] not in ("jobs", "status", "config.yaml")} == before.keys()
    current = pointer.read_current(store)
    assert (found.version, found.tuning) == (current["version"], current["tuning"])
    assert found.metrics["laplace"] == decision(run, "day-2")["metrics"]["candidate"]
    assert "so do its tuning and its metrics" in capsys.readouterr().out
    day(run, 3)
    accepted = current["history"][-1]["evaluation"]
    assert decision(run, "day-3")["drift"]["reference"]["evaluation"] == accepted


@pytest.mark.parametrize("method", ["marglik", "gridsearch"])
def test_a_candidates_prior_was_compared_with_map_however_it_was_chosen(run, method):
    assert day(run, 2, skip_tune=False, tune_method=method).promoted
    store = Checkpoint(str(run))
    manifest = tunings.read_tuning(store, pointer.read_current(store)["tuning"])[0]
    assert manifest["settings"]["method"] == method and set(manifest["search"]["compared"]) == {"nll", "ece"}


def test_a_tuning_leaves_the_windows_that_were_dropped_out(run):
    day(run, 1, drop_window="day-1")
    retune(run)
    current = pointer.read_current(Checkpoint(str(run)))
    assert current["history"][-1]["why"] == "tuned" and pointer.left_out(current) == ["day-1"]
    found = day(run, 2, gate=["nll<=-10"])
    assert found.noticed == () and decision(run, "day-2")["drift"]["passed_over"], "no evaluation accepted this tuning"
