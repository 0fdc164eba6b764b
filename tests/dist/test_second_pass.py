"""EKFAC as a job: a second pass over the data in a committed eigenbasis, the same bits whatever happens in either pass."""

from __future__ import annotations

import dist_cases
import pytest
import torch
from test_runs import distance, one_process

import laplace_dist
from laplace import EKFACLaplace
from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.planning import estimate
from laplace_dist.recalibration import recalibrate
from laplace_dist.report import status as shown
from laplace_dist.run import bases, layout, pointer, windows
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.combination import Window, summed
from laplace_dist.run.layout import PLAN
from laplace_dist.run.ownership import read_plan
from laplace_dist.storage.sealed_json import seal_json
from laplace_dist.storage.store import Store

TOLERANCE = {"float64": 1e-10, "float32": 2e-6}


def config(folder, dtype="float32", **changes):
    own = {"hessian_structure": "ekfac", "model_args": {"dtype": dtype}, "data_args": {"dtype": dtype}}
    return dist_cases.config(folder, **{**own, **changes})


def moments_of(folder, options=None):
    """The bytes of the second moments of the current posterior, and what its basis is told by."""
    store = Checkpoint(str(folder), options)
    version = pointer.read_current(store)["version"]
    found = summed(Window(store, read_plan(store)))
    parts = windows.read_window(found.store, found.plan)["parts"]
    sums = [found.store.read_array(place["prefix"], windows.SUM, place["entry"]).tobytes() for place in parts.values()]
    return version, found.plan.basis["sha256"], sums


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run to which nothing happened: its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    dist_cases.run_inline(config(folder))
    return folder


# --- what is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("subset, estimator", [("all", "ggn"), ("all", "mc"), ("all", "ef"), ("last_layer", "ggn")])
def test_the_posterior_equals_a_fit_in_one_process(tmp_path, subset, estimator, dtype):
    chosen = config(tmp_path, dtype, subset_of_weights=subset, estimator=estimator, seed=5)
    dist_cases.run_inline(chosen)
    ours, alone = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet(dtype)), one_process(chosen, dtype)
    assert type(ours) is type(alone) and isinstance(ours, EKFACLaplace)
    assert ours.sums.tensors.keys() == alone.sums.tensors.keys() and ours.n_data == dist_cases.N
    for name, value in ours.sums.to_tensors().items():
        assert distance(value, alone.sums.to_tensors()[name]) <= TOLERANCE[dtype], name
    assert distance(ours.H.to_matrix(), alone.H.to_matrix()) <= TOLERANCE[dtype]
    x, _ = dist_cases.tensors("test", dtype)
    assert distance(ours(x), alone(x)) <= TOLERANCE[dtype]
    assert distance(ours.log_marginal_likelihood(), alone.log_marginal_likelihood()) <= TOLERANCE[dtype]


def test_the_digest_of_the_basis_is_in_the_plan_of_the_second_pass(undisturbed):
    la = laplace_dist.load_posterior(str(undisturbed), dist_cases.convnet())
    store = Checkpoint(str(undisturbed))
    plan = read_plan(store)
    second = summed(Window(store, plan)).plan
    manifest = bases.read_manifest(store, plan)
    assert second.basis == {"name": "moments", "sha256": bases.digest_of(manifest)}
    assert manifest["factors"].keys() == la.basis.vectors.keys()
    for name, place in manifest["factors"].items():
        kept = store.read_array(place["prefix"], name, place["entry"])
        assert torch.equal(torch.from_numpy(kept), la.basis.vectors[name]), name
    assert (plan.spec["structure"], second.spec["structure"]) == ("kron", "ekfac")
    assert plan.digest != second.digest and second.segments == plan.segments


def test_tuning_and_evaluation_are_of_the_corrected_posterior(tmp_path):
    chosen = config(tmp_path, skip_tune=False, skip_evaluate=False, grid_size=5, prior_range=[1.0, 100.0])
    _, metrics = dist_cases.run_inline(chosen)
    la = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet())
    x, y = dist_cases.tensors("test")
    assert metrics["laplace"]["nll"] == pytest.approx(float(-la(x).gather(1, y[:, None]).log().mean()), rel=1e-5)
    alone, scores = one_process(chosen), {}
    x, y = dist_cases.tensors("val")
    for prior in torch.logspace(0, 2, 5).tolist():
        alone.prior_precision = prior
        scores[prior] = float(-alone(x).gather(1, y[:, None]).log().mean())
    assert min(scores, key=scores.get) == pytest.approx(float(la.prior_precision), rel=1e-6)


def test_the_evidence_tunes_too(tmp_path):
    dist_cases.run_inline(config(tmp_path, skip_tune=False, tune_method="marglik", prior_structure="layerwise"))
    tuned = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet())
    plain = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet(), tuned=False)
    assert len(tuned.prior_precision) == 4
    assert float(tuned.log_marginal_likelihood()) > float(plain.log_marginal_likelihood())


# --- whatever happens ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a driver and its worker."""


def creations(monkeypatch, at=None, after=False):
    """Count what is committed; at a number of these, be killed just before or just after."""
    made, plain = [], Store.create

    def create(self, key, data):
        made.append(f"{self.url}/{key}")
        if len(made) - 1 == at and not after:
            raise Killed
        done = plain(self, key, data)
        if len(made) - 1 == at:
            raise Killed
        return done

    monkeypatch.setattr(Store, "create", create)
    return made


def test_a_kill_at_any_commit_of_either_pass_changes_no_bit(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        made = creations(patch)
        dist_cases.run_inline(config(tmp_path / "whole"))
    both = [sum("/passes/" not in key for key in made), sum("/passes/" in key for key in made)]
    assert min(both) > 7, made
    expected = moments_of(undisturbed)
    assert moments_of(tmp_path / "whole") == expected
    for number, at in enumerate(range(3, len(made), 3)):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            creations(patch, at, after=number % 2 == 0)
            with pytest.raises(Killed):
                dist_cases.run_inline(config(folder))
        dist_cases.run_inline(config(folder))
        assert moments_of(folder) == expected, made[at]
        assert laplace_dist.verify(str(folder)).ok, made[at]


def test_what_is_committed_is_not_computed_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        creations(patch, _first(tmp_path / "count", patch, "/passes/", "partials/000003.json"))
        with pytest.raises(Killed):
            dist_cases.run_inline(config(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    dist_cases.run_inline(config(tmp_path / "run"))
    kept = {path: path.stat().st_mtime_ns for path in before if "config.yaml" not in path.name and path.exists()}
    assert [path for path in kept if "partials" in path.parts and kept[path] != before[path]] == []
    assert sum(path.name.startswith("00000") and path.suffix == ".json" for path in kept) >= 9


def _first(folder, patch, *parts):
    """The number of the first commit whose key holds these."""
    with pytest.MonkeyPatch.context() as inner:
        made = creations(inner)
        dist_cases.run_inline(config(folder))
    return next(number for number, key in enumerate(made) if all(part in key for part in parts))


def test_the_cluster_gives_the_same_bits_though_a_worker_dies_in_the_second_pass(cluster, tmp_path, undisturbed):
    signals, run = tmp_path / "signals", tmp_path / "run"
    signals.mkdir()
    data_args = {"folder": str(signals), "trap": 21, "run": str(run)}
    chosen = config(run, num_workers=2, model_args={}, data="dist_cases:DeadlyInSecondPass", data_args=data_args)
    laplace_dist.fit(chosen)
    assert (signals / "killed").exists()
    assert moments_of(run)[1:] == moments_of(undisturbed)[1:]


def test_a_run_on_s3_is_the_run_on_a_directory(s3, undisturbed):
    url = s3.url()
    dist_cases.run_inline(config(url, storage_options=s3.options))
    assert moments_of(url, s3.options) == moments_of(undisturbed)
    ours, local = (
        laplace_dist.load_posterior(str(place), dist_cases.convnet(), storage_options=options)
        for place, options in ((url, s3.options), (undisturbed, None))
    )
    x, _ = dist_cases.tensors("test")
    assert torch.equal(ours(x), local(x))
    assert laplace_dist.verify(url, s3.options).ok


# --- what does not fit together is refused by name ----------------------------------------------------------------------


def _other_vectors(folder):
    """Commit the eigenvectors of one factor again, with one sign turned: as good, and another basis."""
    store = Checkpoint(str(folder))
    plan = read_plan(store)
    key, values = layout.basis_key("moments"), dict(bases.read_manifest(store, plan))
    name, place = next(iter(values["factors"].items()))
    vectors = store.read_array(place["prefix"], name, place["entry"])
    vectors[:, 0] *= -1
    prefix = f"basis/moments/{'0' * 8}"
    entry = store.write_arrays(prefix, {name: vectors})[name]
    factors = {**values["factors"], name: {"prefix": prefix, "entry": entry}}
    store.replace(key, seal_json({**values, "factors": factors}))


def test_another_basis_is_refused_by_whoever_meets_it(tmp_path):
    dist_cases.run_inline(config(tmp_path))
    _other_vectors(tmp_path)
    with pytest.raises(CheckpointError, match="basis/moments.json is another basis"):
        laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet())
    with pytest.raises(SettingsError, match="the second pass was begun in another basis"):
        dist_cases.run_inline(config(tmp_path))
    found = laplace_dist.verify(str(tmp_path))
    assert [key for key, text in found.problems if "another basis" in text] == [f"passes/moments/{PLAN}"]


def test_a_second_pass_is_not_continued_in_another_basis(tmp_path, monkeypatch):
    at = _first(tmp_path / "count", monkeypatch, "/passes/", "partials/000003.json")
    with monkeypatch.context() as patch:
        creations(patch, at)
        with pytest.raises(Killed):
            dist_cases.run_inline(config(tmp_path / "run"))
    _other_vectors(tmp_path / "run")
    with pytest.raises(SettingsError, match="the second pass was begun in another basis"):
        dist_cases.run_inline(config(tmp_path / "run"))


def test_a_plan_of_other_settings_is_not_the_second_pass_of_this_run(tmp_path):
    dist_cases.run_inline(config(tmp_path))
    store = Checkpoint(str(tmp_path))
    place = store.under("passes/moments")
    values = read_plan(place).to_values()
    place.replace(PLAN, seal_json({**values, "settings": {**values["settings"], "seed": 9}}))
    with pytest.raises(
        SettingsError, match=r"begun in another basis or plan than that of now:\n  --seed: stored 9, now 0"
    ):
        dist_cases.run_inline(config(tmp_path))
    found = dict(laplace_dist.verify(str(tmp_path)).problems)
    assert "is not the plan of the second pass of this run" in found[f"passes/moments/{PLAN}"]


def test_what_is_missing_or_damaged_is_named(tmp_path):
    dist_cases.run_inline(config(tmp_path))
    place = tmp_path / "passes" / "moments"
    chunk = max(
        (p for p in (place / "parts").rglob("*") if p.is_file() and p.suffix != ".json"), key=lambda p: p.stat().st_size
    )
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-8] + bytes(8))
    assert any(key.startswith("passes/moments/parts/") for key, _ in laplace_dist.verify(str(tmp_path)).problems)
    assert not laplace_dist.verify(str(tmp_path)).ok
    chunk.write_bytes(content)
    left = place / "partials" / "000000" / "crashed" / "x"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    found = laplace_dist.verify(str(tmp_path))
    assert found.ok and list(found.orphans) == ["passes/moments/partials/000000/crashed"]
    (tmp_path / "basis" / "moments.json").unlink()
    with pytest.raises(CheckpointError, match="basis/moments.json"):
        laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet())


def test_fresh_deletes_the_second_pass_and_nothing_else(tmp_path):
    dist_cases.run_inline(config(tmp_path))
    (tmp_path / "mine.txt").write_text("kept")
    dist_cases.run_inline(config(tmp_path, hessian_structure="kron", fresh=True))
    assert (
        not [path for path in (tmp_path / "passes").rglob("*") if path.is_file()]
        and (tmp_path / "mine.txt").read_text() == "kept"
    )


def test_another_window_adds_in_the_eigenbasis_of_the_first(tmp_path):
    """Exact second moments of both windows, in the basis of one."""
    chosen = config(tmp_path, "float64", window="first", skip_tune=False, skip_evaluate=False, grid_size=3)
    laplace_dist.fit(chosen, executor=laplace_dist.Inline)
    basis = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet("float64")).basis
    wide = {"margin_nll": 10.0, "margin_ece": 1.0, "level": 0.6, "data": "dist_cases:second_window"}
    second = chosen.model_copy(update={"window": "second", **wide})
    assert recalibrate(second, laplace_dist.Inline).promoted
    la = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet("float64"))
    alone = EKFACLaplace(dist_cases.convnet("float64"), "classification")
    alone.basis = basis
    for data in (dist_cases.blobs("train", "float64"), dist_cases.second_window("train", "float64")):
        alone.fit(torch.utils.data.DataLoader(data, batch_size=4), override=False)
    assert la.n_data == alone.n_data == 2 * dist_cases.N
    assert distance(la.H.to_matrix(), alone.H.to_matrix()) <= 1e-10
    assert laplace_dist.verify(str(tmp_path)).problems == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_structure": "diag"}, "--prior-structure: got 'diag' for an ekfac posterior"),
        ({"backend": "curvlinops"}, "CurvlinopsGGN has no 'ekfac' curvature"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        dist_cases.run_inline(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / PLAN).exists()


def test_a_kron_run_is_not_continued_as_an_ekfac_run(tmp_path):
    dist_cases.run_inline(config(tmp_path, hessian_structure="kron"))
    with pytest.raises(SettingsError, match="--hessian-structure: stored 'kron', now 'ekfac'"):
        dist_cases.run_inline(config(tmp_path))


# --- what is said -------------------------------------------------------------------------------------------------------


def test_status_counts_both_passes(tmp_path, monkeypatch):
    at = _first(tmp_path / "count", monkeypatch, "/passes/", "partials/000003.json")
    with monkeypatch.context() as patch:
        creations(patch, at)
        with pytest.raises(Killed):
            dist_cases.run_inline(config(tmp_path / "run"))
    found = laplace_dist.status(str(tmp_path / "run"))
    assert (found["segments_committed"], found["second_pass"], found["posterior"]) == (6, 3, False)
    lines = list(shown.lines(shown.observed(str(tmp_path / "run"))))
    assert "then       3 of 6 segments in the second pass" in lines


def test_an_estimate_says_that_there_are_two_passes(tmp_path):
    assert any("first of two passes" in text for text in estimate(config(tmp_path / "run")).advice)


def test_the_posterior_is_differentiable_code_of_the_core(undisturbed):
    """What is loaded goes on as what was fitted."""
    la = laplace_dist.load_posterior(str(undisturbed), dist_cases.convnet())
    assert la.sample(3).shape == (3, la.n_params)
    state = la.state_dict()
    other = EKFACLaplace(dist_cases.convnet(), "classification")
    other.load_state_dict(state)
    x, _ = dist_cases.tensors("test")
    assert torch.equal(other(x), la(x))
