"""What a recalibration refuses and says: other settings than the run's, flags that do nothing, the figures of its decision."""

from __future__ import annotations

import shlex
import shutil
from functools import partial
from types import SimpleNamespace

import dist_cases
import pytest
import torch
import yaml
from safetensors.torch import save_file
from window_cases import add, config, fit_inline, two_windows

import laplace_dist
from laplace_dist import cli
from laplace_dist.demo import digits
from laplace_dist.errors import RunFailed, SettingsError
from laplace_dist.job import Job, evaluate_posterior, tune_posterior
from laplace_dist.recalibration import RecalibrationJob
from laplace_dist.report.html.fitted import fitted
from laplace_dist.run import layout, pointer, recalibrations, tunings
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import choose, windows_of
from laplace_dist.run.ownership import read_plan


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with two windows; tests copy it."""
    return two_windows(tmp_path_factory.mktemp("windows") / "run")


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


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
    "a drop of what is named": (
        {"drop_window": "tuesday", "windows": "monday,tuesday"},
        "names the window that --drop-window",
    ),
    "a window of a name that no folder has": ({"window": "x" * 129}, "'_', '-' and '.', at most 128 bytes, such as"),
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


@pytest.mark.parametrize(
    "given",
    [{"pred_type": "nn"}, {"prior_structure": "diag", "tune_method": "marglik"}, {"prior_structure": "layerwise"}],
    ids=lambda given: next(iter(given)),
)
@pytest.mark.parametrize("drop", [None, "tuesday"])
def test_settings_that_no_tuning_takes_are_refused_before_a_window_is_begun(run, given, drop):
    before = everything(Checkpoint(str(run)))
    given = {"tune_method": "gridsearch", **given}
    with pytest.raises(SettingsError, match="--link-approx: got 'probit'|--prior-structure: got"):
        add(run, "wednesday", drop_window=drop, **given)
    after = everything(Checkpoint(str(run)))
    assert {key for key in after if after[key] != before.get(key)} <= {layout.RECALIBRATION_LEASE}


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
    given += ["--model", "dist_cases:convnet", "--data", "window_cases:days", "--batch-size=4", "--segment-size=8"]
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


def test_the_level_of_a_comparison_with_map_is_heeded_by_a_tuning(run, capsys):
    assert cli.main("tune", ["--checkpoint", str(run), "--level=0.8", "--draws=150", "--ray-address=inline"]) == 0
    chosen = tunings.read_tuning(Checkpoint(str(run)), pointer.tuning_of(Checkpoint(str(run))))[0]["settings"]
    assert (chosen["level"], chosen["draws"]) == (0.8, 150)


def test_the_commands_of_the_report_make_the_same_version_again(run, tmp_path):
    """Though the fit was given settings of recalibrations, as by a file that serves both, which are refused as flags."""
    store = Checkpoint(str(run))
    version = pointer.read_current(store)["version"]
    found = fitted(store, read_plan(store), version)
    assert found["not_kept"] == [] and len(found["recalibrations"]) == 1
    for command in (found["command"], *found["recalibrations"]):
        _, job, *words = shlex.split(command)
        words[words.index("--checkpoint") + 1] = str(tmp_path / "again")
        carry_out = cli.recalibrate_main if job == "jobs/recalibrate.py" else partial(cli.main, "fit")
        assert carry_out([*words, "--ray-address=inline", "--skip-report"]) == 0
    assert pointer.read_current(Checkpoint(str(tmp_path / "again")))["version"] == version


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


def test_windows_whose_weight_is_nothing_any_more_are_left_out():
    """Of a year of days under a strong decay, weights underflow; a weight of 0 stands in no version."""
    there = [SimpleNamespace(name=f"day-{k}") for k in range(365)]
    found = choose(there, "all", 0.1)
    assert found[0][0].name == "day-41" and 0 < found[0][1] < 1e-322 and found[-1][1] == 1
    assert len(choose(there, "all", 1.0)) == 365


def shared_file(tmp_path, run):
    given = {"window": "monday", "windows": "last:4", "decay": 0.5, "gate": ["nll<=1"], "skip-evaluate": True}
    given |= {"model": "dist_cases:convnet", "data": "window_cases:days", "data-args": {"day": "monday"}}
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
