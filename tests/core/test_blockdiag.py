"""Block-diagonal posteriors against dense blocks of a naive reference, and the laws of their sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laplace import BlockDiagLaplace, Laplace
from laplace.curvature import backend_class
from laplace.curvature.conformance import SumsConformance
from laplace.linalg import memory
from laplace.predictive import glm_distribution

from . import naive, test_drift, test_layers
from .models import CASES, loader, mlp
from .test_drift import head, times, worst

TOLERANCE = 1e-10
KINDS = {**CASES, **test_layers.CASES}


def fit(model, likelihood, x, y, backend=("native", "ggn"), structure="blockdiag", **kwargs):
    cls, options = backend_class(*backend)
    la = Laplace(model, likelihood, "all", structure, backend=cls, backend_kwargs={**options, **kwargs})
    la.fit(loader(x, y))
    return la


def blocks_of(model, full):
    """The dense matrix with zeros between parameters of different modules."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    owners = [n.rpartition(".")[0] or n for n, _ in named]
    where = torch.cat([torch.full((p.numel(),), owners.index(o)) for (_, p), o in zip(named, owners, strict=True)])
    return torch.where(where[:, None] == where, full, torch.zeros(()).to(full))


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("name", KINDS)
def test_layers_are_the_blocks_of_the_dense_curvature(name, estimator):
    case = KINDS[name]
    model, x, y = case.make()
    la = fit(model, case.likelihood, x, y, ("native", estimator))
    expected = blocks_of(model, naive.full(model, x, y, case.likelihood, estimator))
    assert naive.relative_error(torch.block_diag(*la.H), expected) < TOLERANCE
    assert {row[1] for row in la.coverage} == {"blockdiag"}
    assert float(la.loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)), rel=1e-12)


def test_weight_and_bias_are_one_block_and_parameters_of_the_model_their_own():
    model, x, y = CASES["scalar"].make()
    la = fit(model, "classification", x, y)
    assert list(la.sums.tensors) == ["gate/block", "first/block", "last/block"]
    assert [len(block) for block in la.H] == [1, 16, 15]


class Bare(nn.Module):
    """A model without modules of its own, whose parameters no rule knows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return (x @ self.first).tanh() @ self.second


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), Bare], ids=["linear", "own"])
def test_a_model_that_is_one_layer_has_one_block_as_inside_of_another(make):
    """That of the dense posterior; a state goes from the one to the other, and one with a block each goes on by itself."""
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    inside = nn.Sequential(model)
    la, wrapped = (fit(m, "classification", x, y) for m in (model, inside))
    dense = fit(model, "classification", x, y, structure="full")
    assert list(la.sums.tensors) == ["block"] and naive.relative_error(la.H[0], dense.H) < 1e-14
    assert naive.relative_error(la(x), dense(x)) < 1e-12
    for state, network in ((la.state_dict(), inside), (wrapped.state_dict(), model)):
        new = Laplace(network, "classification", "all", "blockdiag")
        new.load_state_dict(state)
        assert torch.equal(new(x), la(x))
        new.fit(loader(x, y), override=False)
        assert naive.relative_error(new.H[0], 2 * dense.H) < 1e-14


def with_a_block_each(la):
    """The state as it was saved before a model that is one layer had one block."""
    state = la.state_dict()
    names = [block["parameter"] for block in state["spec"]["blocks"]]
    parts = [p.numel() for p in la.params]
    whole, start = la.sums.tensors["block"], 0
    sums = {name: value for name, value in state["sums"].items() if name != "block"}
    factors = {}
    for block, name, size in zip(state["spec"]["blocks"], names, parts, strict=True):
        block["factors"] = [f"{name}/block"]
        sums[f"{name}/block"] = whole[start : start + size, start : start + size].clone()
        factors[f"{name}/block"] = {"shape": [size, size], "symmetric": True}
        start += size
    state["spec"]["factors"], state["sums"] = factors, sums
    return state


def test_a_state_with_a_block_for_each_parameter_of_a_layer_opens_and_takes_no_more_data():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    la = fit(model, "classification", x, y)
    old = Laplace(model, "classification", "all", "blockdiag")
    old.load_state_dict(with_a_block_each(la))
    assert [len(block) for block in old.H] == [12, 3] and torch.equal(old.H[0], la.H[0][:12, :12])
    with pytest.raises(ValueError, match="parameter 'bias' differs; parameter 'weight' differs"):
        old.fit(loader(x, y), override=False)


def test_one_layer_is_the_dense_posterior():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    la, dense = (fit(model, "classification", x, y, structure=s) for s in ("blockdiag", "full"))
    assert naive.relative_error(la.H[0], dense.H) < 1e-14
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(dense.log_marginal_likelihood()), rel=1e-12)
    assert naive.relative_error(la(x), dense(x)) < 1e-12


@pytest.mark.parametrize("prior", ["scalar", "layerwise", "diag"])
@pytest.mark.parametrize(
    "name", ["mlp", "regression", "two-convolutions", "sequence-output", "normed", "tied", "scalar"]
)
def test_evidence_and_predictive_are_those_of_the_dense_matrix(name, prior):
    case = CASES[name]
    model, x, y = case.make()
    la = fit(model, case.likelihood, x, y)
    temper = 1.0
    if case.likelihood == "regression":
        la.sigma_noise = 0.7
        temper = 1 / 0.49
    sizes = {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}
    la.prior_precision = torch.linspace(0.5, 2, sizes[prior])
    precision = temper * torch.block_diag(*la.H) + torch.diag(la.prior_precision_diag)
    log_det = float(torch.linalg.slogdet(precision)[1])
    assert naive.relative_error(torch.block_diag(*la.posterior_precision), precision) < TOLERANCE
    assert naive.relative_error(torch.block_diag(*la.posterior_covariance), torch.linalg.inv(precision)) < TOLERANCE
    assert float(la.log_det_posterior_precision) == pytest.approx(log_det, rel=1e-10)
    ratio = log_det - float(la.prior_precision_diag.log().sum())
    scatter = float((la.mean.square() * la.prior_precision_diag).sum())
    expected = float(la.log_likelihood) - 0.5 * (ratio + scatter)
    assert float(la.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    js = naive.jacobians(model, x)
    covariance = naive.glm_covariance(js, precision)
    assert naive.relative_error(la.functional_variance(js), covariance) < TOLERANCE
    rows = js.flatten(0, 1)
    assert naive.relative_error(la.functional_covariance(rows), rows @ torch.linalg.inv(precision) @ rows.T) < TOLERANCE
    spread = glm_distribution(la, x, diagonal=True)[1].flatten(1)
    assert naive.relative_error(spread, covariance.diagonal(dim1=1, dim2=2)) < TOLERANCE
    delta = torch.linspace(-1, 1, la.n_params).double()
    square = float(delta @ precision @ delta)
    assert float(la.square_norm(la.mean + delta)) == pytest.approx(square, rel=1e-9)
    constant = 0.5 * log_det - 0.5 * la.n_params * math.log(2 * math.pi)
    assert float(la.log_prob(la.mean + delta)) == pytest.approx(constant - 0.5 * square, rel=1e-9)


def test_samples_have_the_posterior_covariance():
    model, x, y = CASES["mlp"].make()
    la = fit(model, "classification", x, y)
    samples = la.sample(40_000, generator=torch.Generator().manual_seed(0))
    covariance = torch.linalg.inv(torch.block_diag(*la.H) + torch.eye(la.n_params))
    assert naive.relative_error(torch.cov(samples.T), covariance) < 0.05


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_the_evidence_tunes_every_prior(structure):
    model, x, y = CASES["mlp"].make(n=20)
    la = fit(model, "classification", x, y)
    before = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=30)
    assert float(la.log_marginal_likelihood()) > before


def test_a_grid_is_scored_as_if_each_value_were_set():
    model, x, y = CASES["mlp"].make(n=20)
    la = fit(model, "classification", x, y)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y), grid_size=5)
    found, scores = float(la.prior_precision), {}
    for value in torch.logspace(-4, 4, 5):
        la.prior_precision = value
        scores[float(value)] = float(-la(x).gather(1, y[:, None]).log().mean())
    assert found == pytest.approx(min(scores, key=scores.get), rel=1e-6)


def test_the_state_is_the_whole_posterior(tmp_path):
    model, x, y = CASES["two-convolutions"].make()
    la = fit(model, "classification", x, y)
    torch.save(la.state_dict(), tmp_path / "state.pt")
    other = Laplace(model, "classification", "all", "blockdiag")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert isinstance(other, BlockDiagLaplace) and torch.equal(other(x), la(x))
    other.fit(loader(x, y), override=False)
    assert other.n_data == 10 and naive.relative_error(other.H[0], 2 * la.H[0]) < 1e-12


class Conformance(SumsConformance):
    """The laws of sums."""

    hessian_structure = "blockdiag"


class TestExact(Conformance):
    """The GGN."""


class TestSampled(Conformance):
    """Draws belong to examples."""

    backend, kwargs = backend_class("native", "mc")
    backend_kwargs = {**kwargs, "seed": 5, "num_samples": 2}


@pytest.mark.parametrize("batch_size", [1, 7, 3000])
@pytest.mark.parametrize("data", ["falling", "rising", "one-large"])
def test_sums_do_not_drift(data, batch_size):
    x, y = worst(data, 300 if batch_size == 1 else 3000)
    f = head().double()(x.double()).detach()
    sums = test_drift.summed(test_drift.laplace(head(), "native", "ggn", "blockdiag"), x, y, batch_size)
    truth = test_drift.reference(x, test_drift.directions(f, y, "ggn"), "full")["full"]
    test_drift.check(sums, {"0/block": truth})


def test_a_small_batch_counts_in_full_after_millions_of_examples():
    la = test_drift.laplace(head(), "native", "ggn", "blockdiag")
    unsure, sure = test_drift.examples(torch.zeros(16)), test_drift.examples(torch.full((16,), 8.0))
    alone = test_drift.summed(la, *sure, 16).tensors["0/block"]
    total = times(test_drift.summed(la, *unsure, 16), 18)
    before = total.tensors["0/block"].clone()
    la.accumulate(total, *sure)
    assert naive.relative_error(total.tensors["0/block"] - before, alone) < 1e-3


@pytest.mark.parametrize("backend", ["curvlinops", "asdl", "backpack"])
def test_other_backends_refuse_by_name(backend):
    cls = backend_class(backend)[0]
    with pytest.raises(ValueError, match=f"{cls.__name__} has no 'blockdiag' curvature"):
        Laplace(mlp(), "classification", "all", "blockdiag", backend=cls)


@pytest.mark.parametrize("subset", ["last_layer", "subnetwork"])
def test_other_subsets_are_refused(subset):
    with pytest.raises(ValueError, match=f"no Laplace approximation for {subset} × blockdiag"):
        Laplace(mlp(), "classification", subset, "blockdiag")


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    model, x, y = CASES["mlp"].make()
    la = fit(model, "classification", x, y)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 8 * 16**2 - 1)
    with pytest.raises(
        MemoryError, match=r"Factorising the dense precision of '0' over 16 parameters needs 8,192 bytes"
    ):
        la.log_marginal_likelihood()
    with pytest.raises(MemoryError, match=r"Factorising the dense precision of '0' over 16 parameters"):
        la(x)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * (16**2 + 15**2) - 1)
    with pytest.raises(MemoryError, match=r"The sums of a 'blockdiag' posterior over 31 parameters.*'ekfac'"):
        Laplace(model, "classification", "all", "blockdiag").fit(loader(x, y))


def test_before_a_fit_there_is_the_prior():
    la = Laplace(mlp(), "classification", "all", "blockdiag", prior_precision=2.0)
    assert not torch.block_diag(*la.H).any()
    assert float(la.log_prob(torch.zeros(la.n_params))) == pytest.approx(0.5 * la.n_params * math.log(1 / math.pi))
