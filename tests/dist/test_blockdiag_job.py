"""Block-diagonal curvature as a job: a plain sum like the others."""

from __future__ import annotations

import dist_cases
import pytest
import torch
import tuning_cases
from test_runs import distance, one_process

import laplace_dist
from laplace import BlockDiagLaplace
from laplace_dist.errors import SettingsError
from laplace_dist.run import decompositions


def config(folder, dtype="float32", **changes):
    own = {"hessian_structure": "blockdiag", "model_args": {"dtype": dtype}, "data_args": {"dtype": dtype}}
    return dist_cases.config(folder, **{**own, **changes})


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
def test_the_posterior_equals_a_fit_in_one_process(tmp_path, estimator, dtype):
    chosen = config(tmp_path, dtype, estimator=estimator, seed=5)
    dist_cases.run_inline(chosen)
    ours, alone = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet(dtype)), one_process(chosen, dtype)
    assert isinstance(ours, BlockDiagLaplace)
    assert list(ours.sums.tensors) == ["0/block", "4/block"]
    tolerance = 1e-10 if dtype == "float64" else 2e-6
    for name, value in ours.sums.to_tensors().items():
        assert distance(value, alone.sums.to_tensors()[name]) <= tolerance, name
    x, _ = dist_cases.tensors("test", dtype)
    assert distance(ours(x), alone(x)) <= tolerance
    assert distance(ours.log_marginal_likelihood(), alone.log_marginal_likelihood()) <= tolerance


def test_committed_decompositions_change_no_number(tmp_path, monkeypatch):
    chosen = {"skip_tune": False, "skip_evaluate": False, "prior_range": [1.0, 100.0], "grid_size": 5}
    without = dist_cases.run_inline(config(tmp_path / "without", **chosen))
    monkeypatch.setattr(decompositions, "WORTH", 1)
    assert dist_cases.run_inline(config(tmp_path / "with", **chosen)) == without
    assert len(list((tmp_path / "with").glob("decompositions/*/*.json"))) == 2
    assert laplace_dist.verify(str(tmp_path / "with")).ok
    x, _ = dist_cases.tensors("test")
    loaded = [laplace_dist.load_posterior(str(tmp_path / name), dist_cases.convnet()) for name in ("with", "without")]
    torch.testing.assert_close(loaded[0](x), loaded[1](x), rtol=1e-5, atol=1e-7)


def test_windows_add_up(tmp_path):
    """What `recalibrate` does to a plain sum, it does to this one."""
    dist_cases.run_inline(config(tmp_path, window="first"))
    chosen = config(
        tmp_path, window="second", data="dist_cases:second_window", data_args={}, model_args={"dtype": "float32"}
    )
    found = laplace_dist.recalibrate(chosen, laplace_dist.Inline)
    la = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet(), version=found.version)
    assert la.n_data == 2 * dist_cases.N


def test_the_last_layer_alone_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no Laplace approximation for last_layer × blockdiag"):
        dist_cases.run_inline(config(tmp_path / "run", subset_of_weights="last_layer"))


def test_a_model_that_is_one_layer_is_one_block(tmp_path):
    """The sum of the model itself has no name of a layer: it is stored, verified, tuned and loaded as all others."""
    chosen = tuning_cases.config(tmp_path, "classes", hessian_structure="blockdiag", tune_method="marglik")
    dist_cases.run_inline(chosen)
    model, train = tuning_cases.classifier(), tuning_cases.classes("train")
    alone = BlockDiagLaplace(model, "classification")
    alone.fit([train.tensors])
    ours = laplace_dist.load_posterior(str(tmp_path), model)
    assert list(ours.sums.tensors) == ["block"] and distance(ours.sums.tensors["block"], alone.H[0]) < 1e-10
    report = laplace_dist.verify(str(tmp_path))
    assert (report.problems, report.orphans) == ([], {})
