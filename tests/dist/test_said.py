"""What a job says before and after its work: coverage in a few lines, defaults, the command that repeats it, a mistyped place."""

from __future__ import annotations

import csv
import io
import shlex

import dist_cases
import pytest
import torch
from torch import nn

import laplace_dist
from laplace_dist import cli, demo
from laplace_dist.config.command import command_of
from laplace_dist.config.command_line import load_config
from laplace_dist.config.settings import Config
from laplace_dist.execution.inline import InlinePool
from laplace_dist.job import evaluate_posterior, fit
from laplace_dist.report.html.facts import facts
from laplace_dist.run import coverage
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan


def mixed() -> nn.Module:
    """Return a network with a kind of parameter for each way to keep it: factors, a diagonal, no uncertainty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    return model.requires_grad_(True)


def frozen() -> nn.Module:
    model = mixed()
    model[1].weight.requires_grad_(False)
    return model


def chosen(folder, **changes) -> Config:
    return dist_cases.config(folder / "run", model="test_said:frozen", **changes)


def test_coverage_is_a_summary_in_the_output_and_a_list_in_a_file(tmp_path):
    said = []
    job = dist_cases.inline_job(chosen(tmp_path))
    job.say = said.append
    with job:
        job.open()
    lines = next(text for text in said if text.startswith("coverage")).splitlines()
    assert lines == [
        "coverage: MAP value alone    1 tensor   288 weights  85.0%",
        "coverage: Kronecker factors  3 tensors   35 weights  10.3%",
        "coverage: diagonal           2 tensors   16 weights   4.7%",
        f"coverage: every parameter is in {tmp_path}/run/coverage.tsv",
    ]
    sizes = {name: parameter.numel() for name, parameter in frozen().named_parameters()}
    with open(tmp_path / "run" / "coverage.tsv", newline="") as file:
        *rows, seal = csv.DictReader(file, delimiter="\t")
    assert seal["parameter"].startswith("# sha256 of the above: ")
    assert {row["parameter"]: int(row["weights"]) for row in rows} == sizes
    assert [row for row in rows if row["kind"] == "map"] == [
        {"parameter": "1.weight", "kind": "map", "weights": "288", "why": "requires_grad=False"}
    ]


def test_shares_add_up_and_what_a_last_layer_leaves_out_is_counted(tmp_path):
    with dist_cases.inline_job(chosen(tmp_path, subset_of_weights="last_layer")) as job:
        job.open()
    store = Checkpoint(str(tmp_path / "run"))
    shares = coverage.summary(coverage.read_coverage(store, read_plan(store)))
    total = sum(parameter.numel() for parameter in frozen().parameters())
    assert sum(share.share for share in shares) == pytest.approx(1)
    assert {share.kind: share.weights for share in shares} == {"kron": 27, "map": total - 27}
    store.replace("coverage.tsv", b"damaged\n")
    left = coverage.summary(coverage.read_coverage(store, read_plan(store)))
    assert [(share.kind, share.weights) for share in left] == [("kron", 27)], "what the plan says"
    ((key, why),) = laplace_dist.verify(store.url).problems
    assert key == "coverage.tsv" and "is truncated or altered" in why and "Delete it" in why


def test_names_of_parameters_survive_the_file(tmp_path):
    rows = [coverage.Row('a\t"b"\n<c>', "kron", 3, "why, so")]
    store = Checkpoint(str(tmp_path))
    coverage.write_coverage(store, rows)
    assert coverage.read_coverage(store, None) == rows
    assert io.StringIO(store.read("coverage.tsv").decode()).readline() == "parameter\tkind\tweights\twhy\n"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_args": {"a": "it's <b>", "n": [1, None]}, "ood": ["far", "near"], "skip_tune": True, "segment_size": 7},
        {
            "cpus_per_worker": 2,
            "seed": 5,
            "gpus_per_worker": 0.0,
            "storage_options": {"key": "geheim"},
            "fresh": True,
        },
    ],
)
def test_the_command_of_settings_gives_these_settings_without_secrets(changes):
    given = Config(**{"model": "m:n", "data": "d:e", "checkpoint": "/a b/run", **changes})
    command = command_of(given, "jobs/fit_kron.py")
    python, job, *flags = shlex.split(command)
    assert (python, job) == ("python", "jobs/fit_kron.py") and "geheim" not in command
    of_recalibrations = {"keep_partials": False, "decay": 1.0}  # which a fit refuses
    expected = given.model_copy(update={"storage_options": {}, "fresh": False, **of_recalibrations})
    assert load_config(flags) == expected


def test_the_command_of_a_recalibration_has_every_threshold_and_names_of_any_kind():
    given = Config(
        model="m:n", data="d:e", checkpoint="run", window="-x", gate=["nll<=1", "ece<=0.1"], windows="last:2"
    )
    assert load_config(shlex.split(command_of(given, "jobs/recalibrate.py"))[2:]) == given


@pytest.mark.parametrize(("job", "own"), [("fit", {"hessian_structure": "diag"}), ("tune", {})])
def test_help_shows_the_defaults_that_hold_with_ones_own_model(job, own, capsys):
    with pytest.raises(SystemExit):
        cli.main(job, ["--help"], checkpoint="runs/here", **own)
    said = " ".join(capsys.readouterr().out.split())
    assert "directory or fsspec URL of the run (runs/here)" in said
    assert (
        f"examples per batch ({Config.model_fields['batch_size'].default})" in said and "laplace_dist.demo:" not in said
    )
    assert (
        f"structure of the curvature: kron, ekfac, diag, blockdiag, full, lowrank ({own.get('hessian_structure', 'kron')})"
        in said
    )
    assert demo.settings()["batch_size"] != Config.model_fields["batch_size"].default
    assert ("Without --model the bundled demo is fitted" if job == "fit" else "is the run's own") in said


@pytest.mark.parametrize("flags", [[], ["--model=dist_cases:convnet", "--data=dist_cases:blobs"]])
@pytest.mark.parametrize("job", ["tune", "evaluate"])
def test_a_mistyped_checkpoint_is_no_run_there(tmp_path, capsys, job, flags):
    assert cli.main(job, [f"--checkpoint={tmp_path / 'mistyped'}", *flags]) == 2
    said = capsys.readouterr().err
    assert (
        f"{tmp_path}/mistyped" in said
        and "there is no run" in said
        and "expected one that a fit job has started" in said
    )
    assert not (tmp_path / "mistyped").exists()


def test_reading_a_mistyped_checkpoint_says_so_too(tmp_path):
    place = str(tmp_path / "mistyped")
    for call in (laplace_dist.status, lambda url: laplace_dist.load_posterior(url, mixed())):
        with pytest.raises(laplace_dist.errors.MissingObjectError, match="there is no run at .*mistyped"):
            call(place)


def test_folders_of_a_posterior_carry_the_names_of_its_factors(tmp_path):
    given = dist_cases.config(tmp_path / "run")
    version = fit(given, executor=laplace_dist.Inline).version
    (folder,) = [path for path in (tmp_path / "run" / "posteriors" / version).iterdir() if path.is_dir()]
    store = Checkpoint(given.checkpoint)
    assert all((folder / name).is_dir() for name in read_plan(store).spec["factors"])


def test_a_job_ends_by_naming_the_report(tmp_path, capsys):
    flags = [
        "--model=dist_cases:convnet",
        "--data=dist_cases:blobs",
        f"--checkpoint={tmp_path / 'run'}",
        "--batch-size=4",
    ]
    assert cli.main("fit", [*flags, "--ray-address=inline", "--gpus-per-worker=0", "--grid-size=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'run'}/report.html"
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "report" / "numbers.json").is_file()


def test_a_fit_that_is_done_starts_nothing_and_a_page_that_is_out_of_date_is_made_again(tmp_path, monkeypatch):
    given = dist_cases.config(tmp_path / "run", skip_tune=False, skip_evaluate=False, skip_report=False)
    first = fit(given, executor=laplace_dist.Inline)
    submitted, real = [], InlinePool.submit
    monkeypatch.setattr(InlinePool, "submit", lambda self, task: submitted.append(task.what) or real(self, task))
    assert fit(given, executor=laplace_dist.Inline) == first and submitted == []
    (tmp_path / "run" / "report" / "numbers.json").write_text("{}")
    assert fit(given, executor=laplace_dist.Inline) == first and submitted == ["report"]
    evaluate_posterior(given.model_copy(update={"batch_size": 5, "segment_size": None}), executor=laplace_dist.Inline)
    assert submitted[-1] == "report" and len(submitted) > 3
    assert facts(Checkpoint(given.checkpoint))["evaluation"]["settings"]["batch_size"] == 5


def test_a_report_that_cannot_be_made_does_not_fail_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr("laplace_dist.report.html.page.page", None)  # calling it is an error
    said = []
    job = dist_cases.inline_job(dist_cases.config(tmp_path / "run", skip_report=False))
    job.say = said.append
    with job:
        job.open()
        job.map()
        job.reduce()
        assert job.report() is None
    assert "Everything else is done; jobs/report.py makes it again." in said[-1]
