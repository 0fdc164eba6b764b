"""Whole runs without Ray: every stage with real workers in this process, against one `fit` of the core library."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import dist_cases
import pytest
import torch
from torch.utils.data import DataLoader

import laplace_dist
from laplace import Laplace
from laplace.curvature import backend_class
from laplace_dist import cli, load_posterior
from laplace_dist.errors import CheckpointError, MissingObjectError, RunFailed, SettingsError
from laplace_dist.execution import timeouts
from laplace_dist.execution.inline import InlinePool
from laplace_dist.run import layout, lifecycle, pointer, tunings, versions
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.stages import reduce

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def one_process(config, dtype="float32"):
    """Fit the same posterior with the core library alone."""
    backend, arguments = backend_class(config.backend, config.estimator or "ggn")  # of three outputs
    if config.estimator == "mc":
        arguments = {**arguments, "seed": config.seed}
    la = Laplace(
        dist_cases.convnet(dtype),
        config.likelihood,
        subset_of_weights=config.subset_of_weights,
        hessian_structure=config.hessian_structure,
        backend=backend,
        backend_kwargs=arguments,
    )
    la.fit(DataLoader(dist_cases.blobs("train", dtype), batch_size=config.batch_size))
    return la


def distance(one, two):
    return float((one.double() - two.double()).norm() / two.double().norm())


run = dist_cases.run_inline


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_posterior_equals_a_fit_in_one_process(tmp_path, structure, subset, estimator, dtype):
    config = dist_cases.config(
        tmp_path,
        hessian_structure=structure,
        subset_of_weights=subset,
        estimator=estimator,
        model_args={"dtype": dtype},
        data_args={"dtype": dtype},
        seed=5,
    )
    run(config)
    ours, alone = load_posterior(str(tmp_path), dist_cases.convnet(dtype)), one_process(config, dtype)
    assert type(ours) is type(alone)
    tensors = alone.sums.to_tensors()
    assert set(ours.sums.to_tensors()) == set(tensors)
    for name, value in ours.sums.to_tensors().items():
        # The same batches, added in float64; what is stored is symmetrised, and a Gram matrix is symmetric to rounding.
        assert distance(value, tensors[name]) <= (1e-12 if dtype == "float64" else 1e-7), name
    x, _ = dist_cases.tensors("test", dtype)
    assert distance(ours(x), alone(x)) <= TOLERANCE[dtype]
    js, f = alone.backend.jacobians(x)
    assert distance(ours.functional_variance(js), alone.functional_variance(js)) <= TOLERANCE[dtype]
    assert distance(ours.log_marginal_likelihood(), alone.log_marginal_likelihood()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", dist_cases.TINY)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_factors_of_one_entry_are_summed_as_any_other(tmp_path, structure, subset, name):
    """A single output, input, unit or parameter makes 1 x 1 factors."""
    config = dist_cases.config(
        tmp_path,
        model="dist_cases:tiny",
        model_args={"name": name},
        data="dist_cases:tiny_data",
        data_args={"name": name},
        likelihood="regression",
        hessian_structure=structure,
        subset_of_weights=subset,
    )
    run(config)
    ours = load_posterior(str(tmp_path), dist_cases.tiny(name))
    alone = Laplace(dist_cases.tiny(name), "regression", subset_of_weights=subset, hessian_structure=structure)
    alone.fit(DataLoader(dist_cases.tiny_data("train", name), batch_size=4))
    for factor, value in ours.sums.to_tensors().items():
        assert value.abs().max() > 0 and distance(value, alone.sums.to_tensors()[factor]) < 1e-10, factor
    x = dist_cases.tiny_data("test", name).tensors[0]
    assert distance(ours(x)[1], alone(x)[1]) < 1e-10
    assert distance(ours.log_marginal_likelihood(), alone.log_marginal_likelihood()) < 1e-10


def test_every_backend_gives_the_same_posterior(tmp_path):
    found = {}
    for backend in ("native", "curvlinops", "asdl"):
        config = dist_cases.config(
            tmp_path / backend, backend=backend, model_args={"dtype": "float64"}, data_args={"dtype": "float64"}
        )
        run(config)
        found[backend] = load_posterior(str(tmp_path / backend), dist_cases.convnet("float64")).sums.to_tensors()
    for name, value in found["native"].items():
        assert distance(found["curvlinops"][name], value) < 1e-10, name
        assert distance(found["asdl"][name], value) < 1e-10, name


def test_running_again_changes_nothing(tmp_path):
    config = dist_cases.config(tmp_path, skip_tune=False, skip_evaluate=False, ood=["other"])
    first = run(config)
    store = Checkpoint(str(tmp_path))
    before = {key: store.read(key) for key in store.list()}
    assert run(config) == first
    assert {key: store.read(key) for key in store.list()} == before


def test_a_lost_posterior_version_is_reduced_to_the_same_name_and_bytes(tmp_path):
    config = dist_cases.config(tmp_path)
    version, _ = run(config)
    store = Checkpoint(str(tmp_path))
    plan = lifecycle.read_plan(store)

    def hashes():
        factors = versions.read_version(store, plan, version)["factors"]
        return {name: place["entry"]["sha256"] for name, place in factors.items()}

    before = hashes()
    store.delete_tree(layout.version_key(version))
    assert run(config) == (version, None)
    assert hashes() == before


def test_the_sum_does_not_depend_on_where_it_is_cut(monkeypatch, tmp_path):
    whole, _ = run(dist_cases.config(tmp_path / "one"))
    one = load_posterior(str(tmp_path / "one"), dist_cases.convnet()).sums.to_tensors()
    monkeypatch.setattr("laplace_dist.plan.plan.PART_ENTRIES", 5)
    monkeypatch.setattr(reduce, "GROUP_BYTES", 40)
    run(dist_cases.config(tmp_path / "many", fresh=True))
    many = load_posterior(str(tmp_path / "many"), dist_cases.convnet()).sums.to_tensors()
    assert len(list((tmp_path / "many" / "parts").glob("*.json"))) > 10
    assert all(torch.equal(many[name], one[name]) for name in one)
    assert laplace_dist.verify(str(tmp_path / "many")).ok


# ------------------------------------------------------------------ tuning and evaluation


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_marglik_tuning_is_that_of_the_core_library(tmp_path, structure):
    config = dist_cases.config(
        tmp_path, skip_tune=False, tune_method="marglik", prior_structure=structure, hessian_structure="diag"
    )
    run(config)
    alone = one_process(config)
    alone.optimize_prior_precision(method="marglik", prior_structure=structure)
    ours = load_posterior(str(tmp_path), dist_cases.convnet())
    assert ours.prior_precision.shape == alone.prior_precision.shape
    assert distance(ours.prior_precision, alone.prior_precision) < 1e-4
    assert load_posterior(str(tmp_path), dist_cases.convnet(), tuned=False).prior_precision.tolist() == [1.0]


def test_grid_search_over_shards_is_that_of_the_core_library(tmp_path):
    config = dist_cases.config(
        tmp_path, skip_tune=False, tune_method="gridsearch", grid_size=21, prior_range=[1e-4, 1e4]
    )
    run(config)
    alone = one_process(config)
    loader = DataLoader(dist_cases.blobs("val"), batch_size=config.batch_size)
    alone.optimize_prior_precision(method="gridsearch", val_loader=loader, grid_size=21)
    ours = load_posterior(str(tmp_path), dist_cases.convnet())
    assert ours.prior_precision.tolist() == alone.prior_precision.tolist()


def test_a_prior_on_the_edge_of_the_grid_is_said(tmp_path):
    said = []
    config = dist_cases.config(tmp_path, skip_tune=False, grid_size=2, prior_range=[1e-4, 1e4])
    with dist_cases.inline_job(config) as job:
        job.say = said.append
        job.open()
        job.map()
        job.tune(job.reduce())
    assert any(
        "The best prior precision, 0.0001, lies at an end of --prior-range 0.0001 10000" in line for line in said
    )


def test_metrics_are_those_of_the_whole_splits(tmp_path):
    config = dist_cases.config(tmp_path, skip_evaluate=False, ood=["other"])
    version, metrics = run(config)
    x, y = dist_cases.tensors("test")
    model, la = dist_cases.convnet(), load_posterior(str(tmp_path), dist_cases.convnet())
    for name, probs in (("map", model(x).softmax(-1)), ("laplace", la(x))):
        assert metrics[name]["accuracy"] == pytest.approx(float((probs.argmax(-1) == y).double().mean()))
        nll = -probs.double()[torch.arange(len(y)), y].log().mean()
        assert metrics[name]["nll"] == pytest.approx(float(nll), rel=1e-5)
        assert 0 <= metrics[name]["ood_auroc/other"] <= 1
    stored = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert stored == {"version": version, "tuning": None, **metrics}


def test_splits_out_of_distribution_that_a_regression_has_no_use_for_are_said(tmp_path):
    changes = {"data": "dist_cases:regression_data", "likelihood": "regression", "ood": ["far"]}
    said = []
    with dist_cases.inline_job(dist_cases.config(tmp_path, skip_evaluate=False, **changes)) as job:
        job.say = said.append
        job.open()
        job.map()
        job.evaluate(job.reduce(), None)
    assert any(
        "evaluate: --ood far is passed over: a prediction of regression has no confidence" in line for line in said
    )


def test_regression_tunes_the_noise_and_reports_coverage(tmp_path):
    config = dist_cases.config(
        tmp_path, data="dist_cases:regression_data", likelihood="regression", skip_tune=False, skip_evaluate=False
    )
    _, metrics = run(config)
    la = load_posterior(str(tmp_path), dist_cases.convnet())
    assert la.sigma_noise.item() != 1.0
    assert set(metrics["map"]) == set(metrics["laplace"]) == {"nll", "rmse", "coverage_90"}
    assert all(math.isfinite(value) for values in metrics.values() for value in values.values())


def test_an_interrupted_evaluation_keeps_its_finished_shards(tmp_path):
    config = dist_cases.config(tmp_path, skip_evaluate=False)
    _, metrics = run(config)
    folder = next(path for path in (tmp_path / "evaluation").iterdir() if path.is_dir())
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    (folder / "test-000001.json").unlink()
    folder.with_suffix(".json").unlink()
    assert run(config)[1] == metrics
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert {name for name in kept if kept[name] != now[name]} == {"test-000001.json"}


class Limits(InlinePool):
    """Notes how long each kind of task might have taken at its end."""

    def __init__(self, config):
        super().__init__(config)
        self.seconds = {}

    def wait(self, seconds, within):
        events = super().wait(seconds, within)
        self.seconds |= {type(event.task).__name__: within.seconds for event in events}
        return events


@pytest.mark.parametrize("given", [None, 77.0])
def test_a_time_out_that_the_user_gives_holds_for_every_task(tmp_path, given, monkeypatch, capsys):
    """What is measured does not hold for the reduction, whose tasks differ in size, nor for what is one task alone."""
    monkeypatch.setattr(timeouts, "ENOUGH", 2)
    config = dist_cases.config(tmp_path, skip_tune=False, skip_evaluate=False, segment_timeout=given)
    with dist_cases.inline_job(config) as job:
        job.session.pool = pool = Limits(job.config)
        job.open()
        job.map()
        version = job.reduce()
        job.evaluate(version, job.tune(version))
    several = timeouts.FLOOR_SECONDS if given is None else given
    assert pool.seconds == {
        "MapSegment": several,
        "SumPart": given,
        "WriteFactors": math.inf if given is None else given,
        "ScoreShard": several,
        "FirstNoWorse": given,
        "CommitChoice": given,
        "EvaluateShard": several,
        "Summarize": given,
    }
    said = capsys.readouterr().out
    assert "tune: 1/1 results" in said and "evaluate: 1/1 results" in said, "so that a line says when they hang"


# ------------------------------------------------------------------ refusals


def test_settings_that_differ_from_the_plan_are_named(tmp_path):
    run(dist_cases.config(tmp_path))
    with pytest.raises(SettingsError, match=r"--estimator: stored 'ggn', now 'ef'"):
        run(dist_cases.config(tmp_path, estimator="ef"))
    assert run(dist_cases.config(tmp_path, estimator="ef", fresh=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred_type": "nn"}, "--link-approx: got 'probit' with --pred-type nn.*expected mc"),
        ({"recalibrate": "both", "likelihood": "regression"}, "--recalibrate: got 'both' for regression"),
        (
            {"tune_method": "gridsearch", "prior_structure": "layerwise"},
            "--prior-structure: got 'layerwise'.*expected scalar",
        ),
        ({"prior_structure": "diag"}, "--prior-structure: got 'diag' for a kron posterior"),
        ({"data": "dist_cases:train_only", "skip_tune": False}, "gives no split 'val'.*--tune-method marglik"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused_before_the_fit(tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        run(dist_cases.config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_nan_names_the_example_and_commits_nothing_of_its_segment(tmp_path):
    config = dist_cases.config(tmp_path, data="dist_cases:with_nan", data_args={"at": 21})
    with pytest.raises(RunFailed, match=r"segment 000002 \(examples 16 to 23\).*NaN or Inf.*indices 21"):
        run(config)
    assert sorted(path.name for path in (tmp_path / "partials").glob("*.json")) == ["000000.json", "000001.json"]


@pytest.mark.parametrize(
    "bad, how, message",
    [
        (
            "val",
            "input",
            r"validation shard 000002 \(.*\) of round 1: The model's output is NaN.*: indices 17\. Nothing is scored",
        ),
        ("test", "input", r"test shard 000002.*: The model's output is NaN.*: indices 17\. Nothing is scored"),
        ("other", "input", r"other shard 000002.*: The model's output is NaN.*: indices 17\. Nothing is scored"),
        ("val", "label", r"validation shard 000002.*Label 7 of example 17 is out of range"),
        ("test", "label", r"test shard 000002.*Label 7 of example 17 is out of range"),
    ],
)
def test_examples_that_cannot_be_scored_are_named(tmp_path, bad, how, message):
    config = dist_cases.config(
        tmp_path,
        data="dist_cases:spoilt",
        data_args={"bad": bad, "at": 17, "how": how},
        ood=["other"],
        tune_method="gridsearch",
        skip_tune=False,
        skip_evaluate=False,
    )
    with pytest.raises(RunFailed, match=message):
        run(config)
    assert not (tmp_path / "evaluation" / "metrics.json").exists()


def test_a_label_out_of_distribution_is_not_looked_at(tmp_path):
    changes = {"data": "dist_cases:spoilt", "data_args": {"bad": "other", "at": 17, "how": "label"}, "ood": ["other"]}
    _, metrics = run(dist_cases.config(tmp_path, skip_evaluate=False, **changes))
    assert "ood_auroc/other" in metrics["map"]


def test_follow_on_jobs_need_a_run(tmp_path):
    from laplace_dist import job

    with pytest.raises(SettingsError, match="where there is no run"):
        job.evaluate_posterior(dist_cases.config(tmp_path / "nothing"))


def follow_on(config, work):
    """Carry out a follow-on stage in this process, as its job does; returns what `work(job, version)` returns."""
    with dist_cases.inline_job(config) as job:
        return work(job, job.current_version())


@pytest.mark.parametrize("job", ["tune", "evaluate"])
def test_follow_on_jobs_refuse_another_likelihood_than_the_run_has(tmp_path, capsys, job):
    """Without `--likelihood`, regression would be taken for classification."""
    right = {"data": "dist_cases:regression_data", "likelihood": "regression"}
    run(dist_cases.config(tmp_path / "run", **right))
    before = Checkpoint(str(tmp_path / "run")).list()
    flags = ["--model=dist_cases:convnet", "--data=dist_cases:regression_data", f"--checkpoint={tmp_path / 'run'}"]
    assert cli.main(job, flags) == 2
    said = capsys.readouterr().err
    assert "--likelihood: got 'classification'" in said and "was fitted with 'regression'" in said
    assert Checkpoint(str(tmp_path / "run")).list() == before
    config = dist_cases.config(tmp_path / "run", **right)
    key = follow_on(config, lambda job, version: job.tune(version))
    assert tunings.read_tuning(Checkpoint(str(tmp_path / "run")), key)[0]["sigma_noise"] != 1.0


IGNORED = ["--mc-samples=2", "--outputs=0", "--kfac-approx=reduce", "--segment-size=4", "--window=x"]


@pytest.mark.parametrize("job", ["tune", "evaluate"])
def test_follow_on_jobs_refuse_what_they_would_not_heed(tmp_path, capsys, job):
    run(dist_cases.config(tmp_path / "run"))
    before = Checkpoint(str(tmp_path / "run")).list()
    for flag in IGNORED:
        assert cli.main(job, [f"--checkpoint={tmp_path / 'run'}", "--ray-address=inline", flag]) == 2
        said = capsys.readouterr().err
        assert f"{flag.partition('=')[0]}: " in said and ("does nothing in this job" in said or "stored" in said)
    assert Checkpoint(str(tmp_path / "run")).list() == before


def test_follow_on_jobs_take_the_structure_of_the_run(tmp_path):
    """They are not asked for it, and a prior that fits it is not refused for the sake of the default."""
    run(dist_cases.config(tmp_path, hessian_structure="diag"))
    config = dist_cases.config(tmp_path, prior_structure="diag")
    assert config.hessian_structure == "kron"
    key = follow_on(config, lambda job, version: job.tune(version))
    assert tunings.read_tuning(Checkpoint(str(tmp_path)), key)[1].numel() > 1


def test_an_example_that_the_driver_cannot_read_is_refused_as_a_setting(tmp_path, capsys):
    """It reads some of each split itself: the first, which shows the shapes, and a sample for the fingerprint."""
    for number, (split, at) in enumerate((("train", 0), ("train", 43), ("val", 19), ("test", 0))):
        flags = ["--model=dist_cases:convnet", "--data=dist_cases:unreadable", f"--checkpoint={tmp_path / 'run'}"]
        flags += [f'--data-args={{"bad": "{split}", "at": {at}}}', "--batch-size=4", "--ray-address=127.0.0.1:1"]
        if split == "train":
            assert cli.main("fit", [*flags, "--gpus-per-worker=0"]) == 2
            assert not (tmp_path / "run").exists()
        else:
            if number == 2:
                run(dist_cases.config(tmp_path / "run"))
            assert cli.main("tune" if split == "val" else "evaluate", flags) == 2
        said = capsys.readouterr().err
        assert f"--data: example {at} cannot be read (OSError: the disk of this data set is gone)" in said


def test_the_cluster_is_left_even_if_the_workers_cannot_be_ended(tmp_path):
    def fail():
        raise ConnectionError("the cluster is gone")

    job, left = dist_cases.inline_job(dist_cases.config(tmp_path)), []
    job.session.pool = SimpleNamespace(close=fail)
    job.session.executor = SimpleNamespace(close=lambda: left.append(True))
    with pytest.raises(ConnectionError, match="the cluster is gone"), job:
        pass
    assert left == [True]


def test_a_checkpoint_in_the_home_directory_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save(dist_cases.convnet().state_dict(), tmp_path / "weights.pt")
    version, _ = run(dist_cases.config("~/runs/one", weights="~/weights.pt"))
    assert (tmp_path / "runs" / "one" / "plan.json").exists() and not (tmp_path / "~").exists()
    assert laplace_dist.status("~/runs/one")["complete"]
    assert laplace_dist.verify("~/runs/one").versions == [version]
    assert load_posterior("~/runs/one", dist_cases.convnet()).n_data == dist_cases.N


def test_loading_refuses_another_model_and_names_what_is_missing(tmp_path):
    with pytest.raises(MissingObjectError, match="plan.json"):
        load_posterior(str(tmp_path), dist_cases.convnet())
    version, _ = run(dist_cases.config(tmp_path))
    model = dist_cases.convnet()
    model[0].bias.data += 1
    with pytest.raises(SettingsError, match="weights are not those of the run"):
        load_posterior(str(tmp_path), model)
    with pytest.raises(SettingsError, match="got a str"):
        load_posterior(str(tmp_path), "dist_cases:convnet")
    frozen = dist_cases.convnet()
    frozen[0].bias.requires_grad_(False)
    others = {
        "has no parameters \\['0.weight', '0.bias', .*model.module": torch.nn.DataParallel(dist_cases.convnet()),
        "requires_grad is False for \\['0.bias'\\]": frozen,
        "is of float64, and the run of float32": dist_cases.convnet("float64"),
    }
    for message, other in others.items():
        for load_weights in (False, True):
            with pytest.raises(SettingsError, match=message):
                load_posterior(str(tmp_path), other, load_weights=load_weights)
    with pytest.raises(MissingObjectError, match="posteriors/0123.json"):
        load_posterior(str(tmp_path), dist_cases.convnet(), version="0123")
    assert pointer.read_current(Checkpoint(str(tmp_path)))["version"] == version


def test_an_altered_byte_of_a_factor_is_found(tmp_path):
    version, _ = run(dist_cases.config(tmp_path))
    chunk = sorted(path for path in (tmp_path / "posteriors" / version).rglob("c/*") if path.is_file())[-1]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"posteriors/{version}/.*altered"):
        load_posterior(str(tmp_path), dist_cases.convnet())
