"""Sketches of curvature and the low-rank posteriors that they give, against the dense matrix."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, LowRankLaplace, SketchedLowRankLaplace, noise
from laplace.curvature import NativeEF, NativeGGN, NativeHessian
from laplace.structures import sketch
from laplace.structures.registry import SECOND_PASSES
from laplace.structures.specification import SumsSpec
from laplace.structures.sums import CurvatureSums

from . import naive
from .models import CASES, loader

NAMES = ("mlp", "regression", "frozen", "stride-padding", "tied", "normed", "sequence-output", "embedding", "grouped")
BACKENDS = {"ggn": NativeGGN, "ef": NativeEF}


def made(name, rank=200, n=9, dtype=torch.float64, estimator="ggn", **kwargs):
    case = CASES[name]
    model, x, y = case.make(n=n, dtype=dtype)
    la = SketchedLowRankLaplace(model, case.likelihood, backend=BACKENDS[estimator], rank=rank, **kwargs)
    return la, model, x, y, case.likelihood


def relative(value, truth):
    return float((value - truth).norm() / truth.norm())


def first_pass(la, x, y, sizes):
    """The first pass over batches of these sizes, each summed alone and then merged."""
    la.initialize(x[:2])
    total, start = la.zero_sums(), 0
    for size in sizes:
        part = la.zero_sums()
        la.accumulate(part, x[start : start + size], y[start : start + size], offset=start)
        total.merge(part)
        start += size
    assert start == len(x)
    return total


@pytest.mark.parametrize("estimator", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_sums_and_eigenpairs_are_those_of_the_dense_curvature(name, estimator):
    la, model, x, y, likelihood = made(name, estimator=estimator)
    dense = naive.full(model, x, y, likelihood, estimator)
    sums = first_pass(la, x, y, [len(x)])
    assert relative(sums.tensors["sketch"], dense @ sketch.random_matrix(sums.spec, 0, "cpu")) < 1e-12
    la.fit(loader(x, y, 4))
    vectors, values = (la.sums.tensors[key] for key in ("vectors", "values"))
    assert relative((vectors * values) @ vectors.T, dense) < 1e-12
    assert values.tolist() == sorted(values.tolist(), reverse=True) and float(values[-1]) > 0
    assert torch.allclose(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64), atol=1e-12)
    assert len(values) == torch.linalg.matrix_rank(dense, rtol=1e-10, hermitian=True)
    assert la.n_data == len(x) and la.loss.item() == pytest.approx(float(naive.loss(model, x, y, likelihood)))


def test_the_core_is_the_curvature_in_the_basis_and_few_eigenpairs_are_its_largest():
    la, model, x, y, likelihood = made("ten-classes", rank=6, oversampling=4, n=30)
    dense = naive.full(model, x, y, likelihood, "ggn")
    first = first_pass(la, x, y, [30])
    basis = SECOND_PASSES["lowrank"].find_all(first)
    assert basis["range"].shape == (dense.shape[0], 10)
    second = la.second_sums(basis)
    la.accumulate(second, x, y)
    core = basis["range"].T @ dense @ basis["range"]
    assert relative(second.tensors["core"], core) < 1e-12
    la.set_second_sums(second, basis)
    assert torch.allclose(la.H[1], torch.linalg.eigvalsh(core).flip(0)[:6], rtol=1e-10)
    truth = torch.linalg.eigvalsh(dense).flip(0)
    assert bool((la.H[1] <= truth[:6] * (1 + 1e-12)).all()) and float(la.H[1][0]) > 0.9 * float(truth[0])


@pytest.mark.parametrize("rank, oversampling", [(3, 2), (6, 4), (12, 8)])
def test_the_error_is_below_the_bound_of_the_paper(rank, oversampling):
    r"""Theorem 10.5 of Halko, Martinsson and Tropp, a mean over test matrices."""
    la, model, x, y, likelihood = made("ten-classes", n=30)
    dense = naive.full(model, x, y, likelihood, "ggn")
    tail = torch.linalg.eigvalsh(dense).flip(0)[rank:].square().sum().sqrt()
    errors = []
    for seed in range(12):
        la = SketchedLowRankLaplace(model, likelihood, rank=rank, oversampling=oversampling, seed=seed)
        basis = SECOND_PASSES["lowrank"].find_all(first_pass(la, x, y, [30]))["range"]
        errors.append(float((dense - basis @ (basis.T @ dense)).norm()))
    assert sum(errors) / len(errors) < math.sqrt(1 + rank / (oversampling - 1)) * float(tail)
    assert len(set(errors)) == len(errors), "other seeds, other matrices"


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [2, 6, 1]])
def test_parts_add_up_to_the_whole(sizes):
    la, _, x, y, _ = made("stride-padding", rank=8)
    whole = first_pass(la, x, y, [9])
    parts = first_pass(la, x, y, sizes)
    assert relative(parts.tensors["sketch"], whole.tensors["sketch"]) < 1e-13 and parts.n_data == 9
    basis = SECOND_PASSES["lowrank"].find_all(whole)
    cores, start = [], 0
    for size in sizes:
        core = la.second_sums(basis)
        la.accumulate(core, x[start : start + size], y[start : start + size], offset=start)
        spec = SumsSpec.from_json(json.loads(json.dumps(core.spec.to_json())))
        assert spec == core.spec
        cores.append(CurvatureSums.from_tensors(spec, core.to_tensors(), core.n_data))
        start += size
    total = cores[0]
    for core in cores[1:]:
        total.merge(core)
    la.set_second_sums(total, basis)
    again = made("stride-padding", rank=8)[0]
    again.fit(loader(x, y, 9))
    vectors, values = again.H
    ours = (la.H[0] * la.H[1]) @ la.H[0].T
    assert relative(ours, (vectors * values) @ vectors.T) < 1e-12


def test_sums_do_not_drift_and_follow_the_precision_of_rows():
    """Many confident examples after a few that are not: a float32 model's sums against rows in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(3000, 4), torch.randint(3, (3000,))
    x[64:] *= 1e-2
    la = SketchedLowRankLaplace(model, "classification", rank=5, oversampling=3)
    sums = first_pass(la, x, y, [50] * 60)
    model = model.double()
    precise = SketchedLowRankLaplace(model, "classification", rank=5, oversampling=3)
    truth = first_pass(precise, x.double(), y, [3000])
    assert relative(sums.tensors["sketch"], truth.tensors["sketch"]) < 2e-6
    basis = SECOND_PASSES["lowrank"].find_all(truth)
    cores = []
    for one, data, network in ((la, x, model.float()), (precise, x.double(), model)):
        network.to(data.dtype)
        core = one.second_sums(basis)
        for start in range(0, 3000, 100):
            one.accumulate(core, data[start : start + 100], y[start : start + 100], offset=start)
        cores.append(core.tensors["core"])
    assert relative(cores[0], cores[1]) < 2e-6


def test_the_posterior_is_the_dense_one_where_the_rank_suffices():
    la, model, x, y, likelihood = made("mlp", prior_precision=0.7)
    full = Laplace(model, likelihood, "all", "full", prior_precision=0.7)
    la.fit(loader(x, y, 4))
    full.fit(loader(x, y, 4))
    assert la.log_marginal_likelihood().item() == pytest.approx(full.log_marginal_likelihood().item(), rel=1e-12)
    assert torch.allclose(la(x), full(x), rtol=1e-10)
    assert la.sample(3, generator=torch.Generator().manual_seed(0)).shape == (3, la.n_params)
    assert {kind for _, kind, _ in la.coverage} == {"lowrank"}


def test_a_state_round_trips():
    la, model, x, y, likelihood = made("mlp", rank=5, oversampling=2)
    la.fit(loader(x, y, 4))
    other = SketchedLowRankLaplace(model, likelihood)
    other.load_state_dict(la.state_dict())
    assert isinstance(la, LowRankLaplace) and torch.equal(other(x), la(x)) and other.H[0].shape[1] == 5


def test_a_sampled_fisher_has_one_matrix_in_both_passes():
    la, model, x, y, likelihood = made("mlp", n=12)
    la = SketchedLowRankLaplace(
        model, likelihood, rank=200, backend_kwargs={"stochastic": True, "seed": 3, "num_samples": 2}
    )
    full = Laplace(model, likelihood, "all", "full", backend_kwargs={"stochastic": True, "seed": 3, "num_samples": 2})
    la.fit(loader(x, y, 4))
    full.fit(loader(x, y, 5))
    assert relative((la.H[0] * la.H[1]) @ la.H[0].T, full.H) < 1e-12


def test_what_cannot_be_is_refused_and_an_earlier_fit_stays():
    la, model, x, y, likelihood = made("mlp", rank=4, oversampling=2)
    la.fit(loader(x, y, 4))
    before = la.H
    with pytest.raises(ValueError, match=r"fit\(override=False\) is not possible for a low-rank posterior"):
        la.fit(loader(x, y, 4), override=False)
    with pytest.raises(ValueError, match="twice; give a DataLoader or list, not an iterator"):
        la.fit(iter(loader(x, y, 4)))
    with pytest.raises(ValueError, match="The data loader is empty"):
        la.fit([])
    with pytest.raises(ValueError, match="The data changes between passes: 9 examples of summed loss"):
        la.fit(Changing(x, y))
    assert la.H is before
    for wrong in ({"rank": 0}, {"rank": 2.0}, {"oversampling": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be a whole number"):
            SketchedLowRankLaplace(model, likelihood, **wrong)
    with pytest.raises(ValueError, match="rows along directions, which NativeHessian has not; use NativeGGN"):
        SketchedLowRankLaplace(model, likelihood, backend=NativeHessian)


def test_curvature_of_zero_and_a_basis_of_another_width_are_refused():
    spec = SumsSpec("lowrank-sketch", (), {}, "float64", 1)
    core = CurvatureSums(spec, {"core": torch.zeros(2, 2).double()}, torch.zeros(()), 3)
    with pytest.raises(ValueError, match="no positive eigenvalue at these weights"):
        sketch.eigenpairs(core, {"range": torch.eye(4, 2).double()})
    with pytest.raises(ValueError, match="The core is of 2 directions, its basis of 3"):
        sketch.eigenpairs(core, {"range": torch.eye(4, 3).double()})
    with pytest.raises(ValueError, match="The sketch of the curvature holds NaN or Inf"):
        sketch.find_range(spec, "range", {"sketch": torch.full((3, 2), torch.nan)}, 1)


class Changing:
    """Gives other inputs at every pass."""

    def __init__(self, x, y):
        self.x, self.y, self.passes = x, y, 0

    def __iter__(self):
        self.passes += 1
        return iter(DataLoader(TensorDataset(self.x * self.passes, self.y), batch_size=4))


def test_the_test_matrix_is_one_of_rows_however_many_are_drawn_together(monkeypatch):
    la, _, x, _, _ = made("mlp", rank=3)
    spec = la.initialize(x)
    whole = sketch.random_matrix(spec, 5, "cpu")
    monkeypatch.setattr(sketch, "_AT_ONCE", 2 * whole.shape[1])
    assert torch.equal(sketch.random_matrix(spec, 5, "cpu"), whole)
    size, columns = whole.shape
    assert torch.equal(whole, noise.normal(5 ^ sketch._STREAM, torch.arange(size), columns))
