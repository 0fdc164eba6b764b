"""`--precision bf16`: passes in bfloat16 and nothing else; weights that a task loads are the ones that it rounds."""

from __future__ import annotations

import os

import dist_cases
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import laplace_dist
from laplace import Laplace
from laplace_dist.errors import SettingsError
from laplace_dist.execution.tasks import Answer
from laplace_dist.execution.worker import Worker
from laplace_dist.run import layout, partial_manifests
from laplace_dist.stages.map import MapSegment


def trained() -> nn.Module:
    """A model whose code runs and changes it while it is built, as one that trains it does."""
    model = dist_cases.convnet()
    x, y = dist_cases.tensors("train")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def fitted_here(structure: str, subset: str) -> torch.Tensor:
    """Return the curvature of the same model and batches by the core library under autocast, whose weights stay."""
    la = Laplace(trained(), "classification", subset, structure)
    batches = torch.utils.data.DataLoader(dist_cases.blobs("train"), batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        la.fit(batches)
    return dense(la)


def dense(la) -> torch.Tensor:
    """Return the curvature of the data as a matrix, or its diagonal."""
    return la.H.to_matrix() if hasattr(la.H, "to_matrix") else la.H


@pytest.mark.parametrize(("structure", "subset"), [("kron", "all"), ("diag", "all"), ("full", "last_layer")])
def test_a_job_in_bfloat16_is_the_core_library_under_autocast(tmp_path, structure, subset):
    save_file(trained().state_dict(), tmp_path / "other.safetensors")
    found = {}
    for precision in ("float32", "bf16"):
        chosen = {"hessian_structure": structure, "subset_of_weights": subset, "precision": precision}
        chosen |= {"model": "test_precision:trained", "weights": str(tmp_path / "other.safetensors")}
        dist_cases.run_inline(dist_cases.config(tmp_path / precision, **chosen))
        found[precision] = dense(laplace_dist.load_posterior(str(tmp_path / precision), trained()))
    expected = fitted_here(structure, subset)
    assert found["bf16"].dtype == torch.float32
    assert (found["bf16"] - expected).norm() <= 2e-6 * expected.norm()
    # Outputs of order 1 that are rounded to 2^-9 at three layers.
    assert 1e-5 < (found["bf16"] - found["float32"]).norm() / expected.norm() < 3e-2


def test_scores_of_the_map_are_those_of_its_rounded_outputs_to_all_digits(tmp_path):
    config = dist_cases.config(
        tmp_path / "run", precision="bf16", model="test_precision:trained", skip_evaluate=False, skip_tune=True
    )
    _, metrics = dist_cases.run_inline(config)
    (x, y), model = dist_cases.tensors("test"), trained()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = torch.cat([model(x[start : start + 4]) for start in range(0, len(x), 4)])
    assert outputs.dtype == torch.bfloat16
    expected = nn.functional.cross_entropy(outputs.double(), y)
    assert metrics["map"]["nll"] == pytest.approx(float(expected), abs=1e-7)


def test_where_numbers_were_made_says_so_though_the_commit_is_another_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("laplace_dist.stages.map.BESIDE", 2**27)  # which data sets of other tests switch off here
    config = dist_cases.config(tmp_path / "run", precision="bf16")
    with dist_cases.inline_job(config) as job:
        job.open()
        worker = Worker(job.config, [], os.getcwd(), False)
        threads = torch.get_num_threads()
        try:
            assert worker.start() == Answer({})
            assert worker.run(MapSegment(job.plan.digest, job.plan.segments[0])) == Answer(None)
            assert worker.finish().outcome["won"]
        finally:
            torch.set_num_threads(threads)
        manifest = partial_manifests.read_manifest(job.store, job.plan, job.plan.segments[0])
    assert manifest["environment"]["precision"]["autocast"] == "bfloat16"
    assert not torch.is_autocast_enabled("cpu")


def test_a_run_is_of_one_precision(tmp_path):
    dist_cases.run_inline(dist_cases.config(tmp_path / "run", precision="bf16"))
    before = (tmp_path / "run" / layout.CURRENT).read_bytes()
    with pytest.raises(SettingsError, match="--precision: stored 'bf16', now 'float32'"):
        dist_cases.run_inline(dist_cases.config(tmp_path / "run"))
    assert (tmp_path / "run" / layout.CURRENT).read_bytes() == before


def test_a_package_that_would_round_its_own_sums_is_refused(tmp_path):
    with pytest.raises(
        SettingsError, match="--precision: got 'bf16' with --backend curvlinops.*expected --backend native"
    ):
        dist_cases.run_inline(dist_cases.config(tmp_path / "run", precision="bf16", backend="curvlinops"))
    assert not (tmp_path / "run").exists()
