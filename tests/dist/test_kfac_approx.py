"""KFAC-reduce as a setting of a run: the core's factors, and part of the plan."""

from __future__ import annotations

import dist_cases
import pytest
import torch
from test_runs import distance
from torch.utils.data import DataLoader

import laplace_dist
from laplace import Laplace
from laplace_dist.errors import SettingsError
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan

DOUBLE = {"model_args": {"dtype": "float64"}, "data_args": {"dtype": "float64"}}


def fitted(structure, approximation):
    la = Laplace(
        dist_cases.convnet("float64"), "classification", "all", structure, backend_kwargs={"kfac_approx": approximation}
    )
    la.fit(DataLoader(dist_cases.blobs("train", "float64"), batch_size=4))
    return la


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_reduce_is_the_core_s_and_not_expand(tmp_path, structure):
    dist_cases.run_inline(dist_cases.config(tmp_path, hessian_structure=structure, kfac_approx="reduce", **DOUBLE))
    ours = laplace_dist.load_posterior(str(tmp_path), dist_cases.convnet("float64"))
    reduced, expanded = (fitted(structure, name) for name in ("reduce", "expand"))
    assert distance(ours.H.to_matrix(), reduced.H.to_matrix()) < 1e-10
    assert distance(ours.H.to_matrix(), expanded.H.to_matrix()) > 1e-3
    x, _ = dist_cases.tensors("test", "float64")
    assert distance(ours(x), reduced(x)) < 1e-10
    assert ours.backend.kfac_approx == "reduce"


def test_it_belongs_to_the_plan(tmp_path):
    dist_cases.run_inline(dist_cases.config(tmp_path, kfac_approx="reduce"))
    assert read_plan(Checkpoint(str(tmp_path))).settings["kfac_approx"] == "reduce"
    with pytest.raises(SettingsError, match="--kfac-approx: stored 'reduce', now None"):
        dist_cases.run_inline(dist_cases.config(tmp_path))


def test_the_default_leaves_plans_as_they_were(tmp_path):
    dist_cases.run_inline(dist_cases.config(tmp_path, kfac_approx="expand"))
    assert "kfac_approx" not in read_plan(Checkpoint(str(tmp_path))).settings
    with pytest.raises(SettingsError, match="--kfac-approx: stored None, now 'reduce'"):
        dist_cases.run_inline(dist_cases.config(tmp_path, kfac_approx="reduce"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hessian_structure": "diag"},
            "--kfac-approx: got 'reduce' with --hessian-structure diag, which has no Kronecker",
        ),
        (
            {"hessian_structure": "full"},
            "--kfac-approx: got 'reduce' with --hessian-structure full, which has no Kronecker",
        ),
        ({"backend": "curvlinops"}, "--kfac-approx: got 'reduce' with --backend curvlinops"),
    ],
)
def test_what_it_means_nothing_to_refuses_it(tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        dist_cases.run_inline(dist_cases.config(tmp_path / "run", kfac_approx="reduce", **changes))
    assert not (tmp_path / "run").exists()


def test_data_of_another_order_of_positions_change_nothing_of_a_linear_model():
    """Without positions to share, the two are one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))
    found = []
    for approximation in ("reduce", "expand"):
        la = Laplace(model, "classification", "all", "kron", backend_kwargs={"kfac_approx": approximation})
        la.fit([(x, y)])
        found.append(la.H_facs.to_matrix())
    assert torch.equal(*found)
