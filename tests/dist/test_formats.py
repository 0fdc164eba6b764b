"""Runs that released versions have written open, go on and load; `fixtures/` keeps one of each format.

`runs_0.1.zip` holds two runs of 0.1 on `dist_cases.convnet` and `dist_cases.blobs` with segments of twelve: `finished`, with tuning
and evaluation, and `interrupted`, with two of four segments committed.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import dist_cases
import pytest
import torch

import laplace_dist
from laplace import Laplace
from laplace_dist.errors import CheckpointError, SettingsError
from laplace_dist.run import lifecycle, partial_manifests
from laplace_dist.run.checkpoint import Checkpoint, open_json
from laplace_dist.storage.sealed_json import seal_json

FIXTURES = Path(__file__).resolve().parent / "fixtures"


@pytest.fixture
def old(tmp_path):
    """Unpack the runs of 0.1 and return the folder."""
    with zipfile.ZipFile(FIXTURES / "runs_0.1.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def one_process():
    la = Laplace(dist_cases.convnet(), "classification", subset_of_weights="all", hessian_structure="kron")
    la.fit(torch.utils.data.DataLoader(dist_cases.blobs("train"), batch_size=4))
    return la.sums.to_tensors()


def same(ours, expected):
    for name, value in expected.items():
        assert float((ours[name] - value).norm() / value.norm()) < 1e-5, name


def config(url, **changes):
    return dist_cases.config(url, segment_size=12, **changes)


def test_a_finished_run_of_0_1_loads_verifies_and_is_not_done_again(old):
    url = old / "finished"
    assert json.loads((url / "plan.json").read_text())["format_version"] == 1
    la = laplace_dist.load_posterior(str(url), dist_cases.convnet(), load_weights=True)
    assert la.n_data == dist_cases.N and la.prior_precision.tolist() == pytest.approx([1e-4])
    same(la.sums.to_tensors(), one_process())
    report = laplace_dist.verify(str(url))
    assert report.ok and (report.committed, len(report.versions)) == (4, 1)
    assert any("0.1, which recorded none" in kind for kind in report.environments)
    before = {key: Checkpoint(str(url)).read(key) for key in Checkpoint(str(url)).list()}
    version, _ = dist_cases.run_inline(config(url))
    after = {key: Checkpoint(str(url)).read(key) for key in Checkpoint(str(url)).list()}
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == {"config.yaml"}
    assert laplace_dist.status(str(url))["complete"] and f"posteriors/{version}.json" in before


def test_an_interrupted_run_of_0_1_goes_on(old):
    """Its partials count as they are; new ones are of the present format, and the sum is that of all."""
    url = old / "interrupted"
    kept = {p.name: p.read_bytes() for p in (url / "partials").glob("*.json")}
    assert len(kept) == 2
    _, metrics = dist_cases.run_inline(config(url, skip_tune=False, skip_evaluate=False))
    assert {p.name: p.read_bytes() for p in (url / "partials").glob("*.json") if p.name in kept} == kept
    same(laplace_dist.load_posterior(str(url), dist_cases.convnet()).sums.to_tensors(), one_process())
    assert laplace_dist.verify(str(url)).problems == []
    assert 0 < metrics["laplace"]["nll"] < 10


def test_another_plan_than_that_of_a_run_of_0_1_is_refused_by_name(old):
    with pytest.raises(SettingsError, match=r"--estimator: stored 'ggn', now 'ef'"):
        dist_cases.run_inline(config(old / "interrupted", estimator="ef"))
    with pytest.raises(SettingsError, match=r"--data \(contents, as sha256\)"):
        dist_cases.run_inline(config(old / "interrupted", data="dist_cases:with_nan", data_args={"at": 2}))


def test_what_0_1_emptied_is_refused(old):
    """It stored every symmetric factor of one entry as zero."""
    store = Checkpoint(str(old / "interrupted"))
    plan = lifecycle.read_plan(store)
    key = "partials/000000.json"
    manifest = open_json(store.read(key), key)
    emptied = {**manifest["arrays"]["4.weight/B"], "shape": [1, 1], "packed": True}
    with pytest.raises(
        CheckpointError, match=r"written by laplace_dist 0.1, which stored every symmetric.*: one\. Start"
    ):
        partial_manifests.refuse_emptied({"one": emptied}, 1, key, "Start again with --fresh.")
    partial_manifests.refuse_emptied({"one": emptied}, 2, key, "")
    partial_manifests.refuse_emptied(manifest["arrays"], 1, key, "")
    assert seal_json(manifest) and partial_manifests.read_manifest(store, plan, plan.segments[0])["format_version"] == 1
