"""Runs over examples with weights: those of the repeated examples, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import dist_cases
import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from source_cases import write
from test_runs import distance
from torch import nn
from torch.utils.data import TensorDataset
from window_cases import factors, fit_inline, same

import laplace_dist
from laplace_dist import cli
from laplace_dist.config.training import Training
from laplace_dist.data import example_weights
from laplace_dist.data.sources import load_split
from laplace_dist.data.zarr_split import ZarrSplit
from laplace_dist.errors import CheckpointError, RunFailed, SettingsError
from laplace_dist.marglik import marglik_train
from laplace_dist.recalibration import recalibrate
from laplace_dist.run import layout, partial_manifests, pointer, windows
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.run.combination import windows_of
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.sealed_json import seal_json

N = dist_cases.N
WHOLE = torch.tensor([i % 4 for i in range(N)], dtype=torch.float64)  # 0, 1, 2, 3, 0, …
REAL = torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * (WHOLE > 0)


def flat():
    """Return `convnet` of rows of pixels."""
    return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *dist_cases.convnet()).eval()


class Weighted(TensorDataset):
    """Examples with an attribute `w`."""

    def __init__(self, *tensors, w):
        super().__init__(*tensors)
        self.w = w


def fresh(split, dtype="float32"):
    """Return enough examples for a comparison."""
    parts = [dist_cases.tensors(name, dtype) for name in (split, "train", "val", "test")]
    return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def shifted(split, dtype="float64"):
    """Another window, without weights."""
    return dist_cases.second_window(split, dtype) if split == "train" else fresh(split, dtype)


def weighted(split, kind="real", dtype="float32", value=None, at=0, shift=0.0):
    """Training examples with weights, one of them another one if `value` is given; other splits have none."""
    if split != "train":
        return fresh(split, dtype)
    x, y = dist_cases.tensors(split, dtype)
    w = (WHOLE if kind == "whole" else REAL).clone()
    if value is not None:
        w[at] = float(value)
    return Weighted(x + shift, y, w=w)


def plainly(split, kind, shift):
    """The same without weights."""
    data = weighted(split, kind, shift=shift)
    return TensorDataset(*data.tensors)


def repeated(split, dtype="float32"):
    """Every training example as often as its whole weight says."""
    x, y = dist_cases.tensors(split, dtype)
    times = torch.arange(N).repeat_interleave(WHOLE.long())
    return TensorDataset(x[times], y[times]) if split == "train" else TensorDataset(x, y)


def weighted_everywhere(split, value):
    """Weights in the other splits too, all of this value."""
    x, y = dist_cases.tensors(split)
    return Weighted(x, y, w=REAL if split == "train" else np.full(len(x), value))


def union(split, dtype="float64"):
    """Two windows in one: weighted examples, and shifted ones without weights, which count once."""
    if split != "train":
        return fresh(split, dtype)
    x, y = dist_cases.tensors(split, dtype)
    return Weighted(torch.cat([x, x + 1]), torch.cat([y, y]), w=torch.cat([REAL, torch.ones(N).double()]))


def config(folder, kind="real", dtype="float32", value=None, at=0, **changes):
    given = {"value": value, "at": at} if value is not None else {}
    own = {
        "data": "test_weighted_runs:weighted",
        "data_args": {"kind": kind, "dtype": dtype, **given},
        "model_args": {"dtype": dtype},
        "example_weights": "w",
    }
    return dist_cases.config(folder, **{**own, **changes})


def loaded(folder, dtype="float64"):
    return laplace_dist.load_posterior(str(folder), dist_cases.convnet(dtype))


def matrix(la):
    """The curvature as something that does not depend on signs of eigenvectors."""
    if la.sums.spec.structure == "lowrank":
        vectors, values = (la.sums.tensors[name] for name in ("vectors", "values"))
        return (vectors * values) @ vectors.T
    if la.sums.spec.structure == "ekfac":
        return la.H.to_matrix()
    return torch.cat([value.flatten() for value in la.sums.tensors.values()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over examples with real weights, with everything that a run can have; tests copy it."""
    place = tmp_path_factory.mktemp("weighted") / "run"
    fit_inline(
        config(place, skip_tune=False, skip_evaluate=False, skip_report=False, window="first", keep_partials=True)
    )
    return place


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# --- what is computed ---------------------------------------------------------------------------------------------------

CASES = [
    *[(structure, "ggn", "all") for structure in ("kron", "diag", "full", "blockdiag", "ekfac", "lowrank")],
    *[(structure, "ef", "all") for structure in ("kron", "diag", "ekfac")],
    *[(structure, "ggn", "last_layer") for structure in ("kron", "diag", "full")],
]


@pytest.mark.parametrize(("structure", "estimator", "subset"), CASES)
def test_a_run_over_whole_weights_is_one_over_repeated_examples(tmp_path, structure, estimator, subset):
    same = {"hessian_structure": structure, "estimator": estimator, "subset_of_weights": subset, "rank": 200}
    dist_cases.run_inline(config(tmp_path / "one", "whole", "float64", **same))
    data = {"data": "test_weighted_runs:repeated", "data_args": {"dtype": "float64"}, "example_weights": None}
    dist_cases.run_inline(config(tmp_path / "two", dtype="float64", **same, **data))
    ours, theirs = loaded(tmp_path / "one"), loaded(tmp_path / "two")
    assert ours.n_data == theirs.n_data == 66
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-12)
    # Eigenvectors of a rounded sum may turn where eigenvalues are close, and with them what is taken in their basis.
    assert distance(matrix(ours), matrix(theirs)) < (1e-6 if structure == "ekfac" else 1e-10)
    assert float(ours.log_marginal_likelihood()) == pytest.approx(float(theirs.log_marginal_likelihood()), rel=1e-8)


@pytest.mark.parametrize(("estimator", "segment_size"), [("ggn", 8), ("ggn", N), ("ef", 24), ("mc", 8)])
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_run_over_real_weights_is_a_fit_in_one_process(tmp_path, estimator, segment_size, loader_workers):
    """Also in one segment, and with the same draws."""
    chosen = config(tmp_path, dtype="float64", estimator=estimator, segment_size=segment_size, seed=3)
    dist_cases.run_inline(chosen.model_copy(update={"loader_workers": loader_workers}))
    ours, data = loaded(tmp_path), weighted("train", dtype="float64")
    alone = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet("float64"))
    sums = alone.zero_sums()
    alone.accumulate(sums, *data.tensors, example_weights=data.w)
    alone.set_sums(sums)
    assert ours.n_data == pytest.approx(float(REAL.sum()), rel=1e-12)
    assert float(ours.loss) == pytest.approx(float(alone.loss), rel=1e-12)
    assert distance(matrix(ours), matrix(alone)) < 1e-12


SECOND = {"window": "second", "margin_nll": 10.0, "margin_ece": 1.0, "grid_size": 5, "prior_range": [1e-4, 1e4]}
SECOND |= {"skip_tune": False, "skip_evaluate": False}


def test_windows_with_weights_and_without_are_one_fit_over_the_union(tmp_path):
    dist_cases.run_inline(config(tmp_path / "two", dtype="float64", window="first"))
    own = {"data": "test_weighted_runs:shifted", "data_args": {"dtype": "float64"}, "example_weights": None}
    chosen = config(tmp_path / "two", dtype="float64", **{**own, **SECOND, "keep_partials": True})
    recalibrate(chosen, laplace_dist.Inline)
    whole = {"data": "test_weighted_runs:union", "data_args": {}}
    dist_cases.run_inline(config(tmp_path / "one", dtype="float64", **whole))
    found, wanted = factors(tmp_path / "two"), factors(tmp_path / "one")
    assert found["n"] == pytest.approx(wanted["n"]) == pytest.approx(float(REAL.sum()) + N)
    for name, value in wanted.items():
        assert np.allclose(found[name], value, rtol=1e-10, atol=1e-12), name
    assert cli.verify_main([f"--checkpoint={tmp_path}/two", "--data", "--ray-address=inline"]) == 0


def test_a_window_of_weighted_examples_is_read_again_by_its_own_settings(run):
    """Decay is of windows, weights are of examples: both multiply."""
    own = {"kind": "real", "shift": 1.0}
    recalibrate(config(run, data_args=own, decay=0.5, keep_partials=True, **SECOND), laplace_dist.Inline)
    assert factors(run)["n"] == pytest.approx(1.5 * float(REAL.sum()))
    assert cli.verify_main([f"--checkpoint={run}", "--data", "--ray-address=inline"]) == 0


@pytest.mark.parametrize("given", ["example-weights: null\n", "example_weights: null\n", ""])
def test_a_window_that_forgets_the_weights_of_its_data_is_refused_by_name(run, tmp_path, capsys, given):
    """By null in a file and by nothing alike, which both mean a weight of 1 for each example."""
    path = tmp_path / "second.yaml"
    path.write_text(
        "model: dist_cases:convnet\nmodel-args: {dtype: float32}\ndata: test_weighted_runs:weighted\n"
        "data-args: {kind: real, shift: 1.0}\nbatch-size: 4\nsegment-size: 8\nray-address: inline\nskip-tune: true\n"
        f"gpus-per-worker: 0\nwindow: second\ncheckpoint: {run}\n{given}"
    )
    before = pointer.read_current(Checkpoint(str(run)))
    assert cli.recalibrate_main(["--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert (
        "--example-weights: got none, which is a weight of 1 for each example, but window first counts by 'w'" in said
    )
    assert "example 0 of these data has the weight" in said and "Give --example-weights w" in said
    assert pointer.read_current(Checkpoint(str(run))) == before and not (run / "windows").exists()
    text = path.read_text().replace("test_weighted_runs:weighted", "test_weighted_runs:plainly")
    path.write_text(text)
    assert cli.recalibrate_main(["--config", str(path)]) in (0, 3)
    store = Checkpoint(str(run))
    assert [window.plan.n_data for window in windows_of(store, read_plan(store))][1] == N


def test_columns_of_files_are_those_of_their_window(tmp_path):
    """The first window has none of that name, nor need it have: its data are read as its own settings say."""
    for split, n, w in (("first/train", 20, None), ("second/train", 12, np.arange(12.0)), ("test", 20, None)):
        for folder in ("first", "second") if split == "test" else ("",):
            x = np.random.default_rng(n).normal(size=(n, 36)).astype(np.float32)
            columns = {"x": pa.FixedSizeListArray.from_arrays(x.ravel(), 36), "y": np.arange(n) % 3}
            write(tmp_path / folder / split / "a.parquet", pa.table(columns if w is None else {**columns, "w": w}))
    own = {
        "model": "test_weighted_runs:flat",
        "model_args": {},
        "data_args": {},
        "skip_tune": True,
        "keep_partials": True,
    }
    own |= {"dict_key_x": "x", "dict_key_y": "y"}
    first = {"data": str(tmp_path / "first"), "example_weights": None, "window": "first"}
    dist_cases.run_inline(config(tmp_path / "run", **{**own, **first}))
    second = {"data": str(tmp_path / "second"), "margin_nll": 10.0, "margin_ece": 1.0, "window": "second"}
    recalibrate(config(tmp_path / "run", **{**own, **second, "skip_tune": True}), laplace_dist.Inline)
    store = Checkpoint(str(tmp_path / "run"))
    assert [window.plan.n_data for window in windows_of(store, read_plan(store))] == [20, 66.0]
    third = {**own, **second, "window": "third", "example_weights": None, "skip_tune": True}
    with pytest.raises(SettingsError, match="window second counts by 'w', .* or leave that column out of the data"):
        recalibrate(config(tmp_path / "run", **third), laplace_dist.Inline)
    assert cli.verify_main([f"--checkpoint={tmp_path}/run", "--data", "--ray-address=inline"]) == 0


def test_several_module_groups_have_the_bits_of_one(finished, tmp_path):
    dist_cases.run_inline(config(tmp_path / "run", window="first", module_groups=2))
    assert same(factors(finished), factors(tmp_path / "run"))


def test_manifests_say_the_weights(run):
    store = Checkpoint(str(run))
    plan = read_plan(store)
    assert plan.data["weights"]["sum"] == plan.n_data == pytest.approx(float(REAL.sum()))
    assert plan.data["weights"]["zero"] == 11 and plan.n_examples == N
    found = list(partial_manifests.manifests(store, plan))
    assert [m["n_data"] for m in found] == [8, 8, 8, 8, 8, 4]
    for manifest in found:
        part = REAL[manifest["start"] : manifest["stop"]]
        assert manifest["weight"] == pytest.approx(float(part.sum()), rel=1e-12)
    assert windows.read_window(store, plan)["n_data"] == plan.n_data == loaded(run, "float32").n_data


def test_examples_are_the_same_whatever_their_weights():
    """What a window shares with another one is told by examples, so weights do not hide it."""
    one, two = (weighted("train", kind) for kind in ("real", "whole"))
    chosen = config("unused")
    prints = [laplace_dist.stages.resolving.fingerprint(chosen, split, "train") for split in (one, two)]
    assert prints[0]["weights"] != prints[1]["weights"]
    assert [found["sha256"] for found in prints] == [prints[0]["sha256"]] * 2
    assert laplace_dist.plan.identity.shared_examples(*prints, 0.01) == "all of them are the same"


# --- resuming -----------------------------------------------------------------------------------------------------------


def half(folder, **changes):
    """A run of which three segments are committed."""
    chosen = config(folder, window="first", keep_partials=True, **changes)
    with dist_cases.inline_job(chosen) as job:
        job.open()
        job.map()
    for number in ("000001", "000003", "000005"):
        shutil.rmtree(folder / "partials" / number)
        (folder / "partials" / f"{number}.json").unlink()
    return chosen


def test_a_run_goes_on_to_the_same_bits(finished, tmp_path):
    dist_cases.run_inline(half(tmp_path / "run"))
    versions = [pointer.read_current(Checkpoint(str(place)))["version"] for place in (finished, tmp_path / "run")]
    assert versions[0] == versions[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": 0.75, "at": 13}, r"--example-weights \(values, as sha256\): stored '[0-9a-f]{64}', now"),
        ({"example_weights": None}, "--example-weights: stored 'w', now None"),
        ({"kind": "whole"}, "--example-weights .values"),
    ],
)
def test_other_weights_are_refused_on_resuming(tmp_path, changes, said):
    """Also of an example of which no one takes a sample."""
    half(tmp_path / "run")
    with pytest.raises(SettingsError, match=said):
        dist_cases.run_inline(config(tmp_path / "run", window="first", **changes))
    half(tmp_path / "plain", example_weights=None)
    with pytest.raises(SettingsError, match="--example-weights: stored None, now 'w'"):
        dist_cases.run_inline(config(tmp_path / "plain", window="first"))


def test_a_worker_with_other_weights_is_refused(tmp_path):
    chosen = config(tmp_path / "run")
    with dist_cases.inline_job(chosen) as job:
        job.open()
        plan = job.plan
        wanted = {**plan.data["weights"], "sampled": {**plan.data["weights"]["sampled"], "5": 7.0}}
        with pytest.raises(SettingsError, match=r"example 5 .* on node b has the weight .*, the driver's has 7\.0"):
            example_weights.check_same(weighted("train"), wanted, "node b")
        job.map()
        found = list(partial_manifests.manifests(job.store, plan))
        windows.check_weight(plan, found)
        key = layout.partial_key("000002")
        job.store.replace(key, seal_json({**found[2], "weight": found[2]["weight"] + 1e-3}))
        with pytest.raises(RunFailed, match="weights of the examples that were read sum up to"):
            job.reduce()
        report = laplace_dist.verify(str(tmp_path / "run"))
        assert [key for key, _ in report.problems] == ["partials"] and "sum up to" in report.problems[0][1]
        del found[2]["weight"]
        job.store.replace(key, seal_json(found[2]))
        with pytest.raises(CheckpointError, match="its weight is None, expected .the sum of the examples. weights"):
            job.reduce()


def test_verify_reads_the_weights_again(run):
    data = weighted("train")
    assert laplace_dist.verify(str(run), data=data).ok
    data.w[13] += 1e-9
    report = laplace_dist.verify(str(run), data=data)
    assert [key for key, _ in report.problems] == ["partials/000001.json"]
    data.w[13] = -1.0
    report = laplace_dist.verify(str(run), data=data)
    assert "example 13 of the split 'train' has the weight -1.0" in report.problems[0][1]


# --- what is said -------------------------------------------------------------------------------------------------------


def test_the_report_says_examples_and_weights(run):
    numbers = json.loads((run / "report" / "numbers.json").read_text())["fitted"]
    assert numbers["data"]["weights"] == {"name": "w", "sum": pytest.approx(float(REAL.sum())), "zero": 11}
    assert numbers["data"]["length"] == N and numbers["examples"] == pytest.approx(float(REAL.sum()))
    page = (run / "report.html").read_text()
    assert f"whose weights (<code>w</code>) sum to {float(REAL.sum()):,.2f} and are 0 for 11" in page
    assert "examples, counted by their weights" in page and "--example-weights w" in page


def test_the_plan_and_the_fit_say_them(tmp_path, capsys):
    flags = [
        "--model=dist_cases:convnet",
        "--data=test_weighted_runs:weighted",
        "--example-weights=w",
        "--batch-size=4",
    ]
    flags += [f"--checkpoint={tmp_path}/run", "--skip-tune", "--skip-evaluate", "--skip-report", "--ray-address=inline"]
    assert cli.plan_main(flags) == 0
    line = f"'w' of 44 examples: they sum to {float(REAL.sum()):,.10g}, 11 of them 0"
    assert f"weights    {line}" in capsys.readouterr().out
    assert cli.main("fit", flags) == 0
    said = capsys.readouterr()
    assert f"example weights: {line}" in said.out + said.err
    assert loaded(tmp_path / "run", "float32").n_data == pytest.approx(float(REAL.sum()))


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("-0.5", r"example 7 of the split 'train' has the weight -0\.5; a weight is .* and 0 leaves an example out"),
        ("nan", "example 7 of the split 'train' has the weight nan"),
        ("inf", "example 7 of the split 'train' has the weight inf"),
        ("1e13", r"largest weight of the split 'train' is 1e\+13, .*; divide all by a common factor"),
    ],
)
def test_bad_weights_are_refused_before_anything_is_written(tmp_path, value, said):
    with pytest.raises(SettingsError, match=f"^--example-weights: .*{said}"):
        dist_cases.run_inline(config(tmp_path / "run", value=value, at=7))
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(N), "every weight of the split 'train' is 0, which leaves no example"),
        (torch.ones(N - 1), "the attribute 'w' of the data set has 43 entries for 44 examples"),
        (torch.ones(N, 1), r"'w' of the split 'train' has shape \(44, 1\) for 44 examples"),
        (["a"] * N, "'w' of the split 'train' holds no numbers"),
        (None, "the split 'train' has no attribute 'w'; give it one with a number for each example, or leave"),
        (lambda: 1, "the split 'train' has no attribute 'w'"),
        (torch.full((N,), 1e-14), "the largest weight of the split 'train' is 1e-14"),
    ],
)
def test_what_are_no_weights_is_refused(given, said):
    with pytest.raises(SettingsError, match=f"^--example-weights: {said}"):
        example_weights.facts(Weighted(*dist_cases.tensors("train"), w=given), "w")


def test_weights_of_other_splits_are_refused_unless_they_are_one(tmp_path):
    own = {"data": "test_weighted_runs:weighted_everywhere", "skip_evaluate": False}
    with pytest.raises(
        SettingsError, match=r"example 0 of the split 'test' has the weight 2\.0, but tuning and evaluation"
    ):
        dist_cases.run_inline(config(tmp_path / "two", **{**own, "data_args": {"value": 2.0}}))
    assert not (tmp_path / "two" / "plan.json").exists()
    dist_cases.run_inline(config(tmp_path / "one", **{**own, "data_args": {"value": 1.0}}))


@pytest.mark.parametrize("backend", ["curvlinops", "asdl", "backpack"])
def test_other_backends_are_refused_by_name(tmp_path, backend):
    with pytest.raises(SettingsError, match=f"--example-weights: got 'w' with --backend {backend}, whose package"):
        dist_cases.run_inline(config(tmp_path / "run", backend=backend))


def test_a_training_is_refused_by_name(tmp_path):
    with pytest.raises(
        SettingsError, match="--example-weights: got 'w'; a training by empirical Bayes counts every example"
    ):
        marglik_train(config(tmp_path / "run"), Training(), laplace_dist.Inline)


# --- Zarr ---------------------------------------------------------------------------------------------------------------


def test_an_array_of_a_zarr_group(tmp_path):
    for split in ("train", "val", "test"):
        x, y = dist_cases.tensors(split)
        group = zarr.open_group(tmp_path / "data", mode="a").create_group(split)
        more = {"w": REAL.numpy()} if split == "train" else {}
        for name, values in {"x": x.numpy(), "y": y.numpy(), **more}.items():
            group.create_array(name, data=values, chunks=(5, *values.shape[1:]))
    chosen = {"data": str(tmp_path / "data"), "data_args": {}, "window": "first"}
    by_attribute = dist_cases.run_inline(config(tmp_path / "one", window="first"))[0]
    assert dist_cases.run_inline(config(tmp_path / "two", **chosen))[0] == by_attribute, "a version is its bits"
    split = load_split(config("unused", **chosen), "train")
    assert isinstance(split, ZarrSplit)
    with pytest.raises(SettingsError, match="the split 'train' has no array 'v'"):
        example_weights.facts(split, "v")


def test_plans_without_weights_are_as_they_were(tmp_path):
    """No field is added to what is stored of runs without."""
    dist_cases.run_inline(dist_cases.config(tmp_path / "run", keep_partials=True))
    store = Checkpoint(str(tmp_path / "run"))
    plan = read_plan(store)
    assert "weights" not in plan.data and "example_weights" not in plan.settings
    for key in store.list("partials", recursive=False):
        if key.endswith(".json"):
            assert "weight" not in open_json(store.read(key), key)
    assert replace(plan, run=None).n_data == N
