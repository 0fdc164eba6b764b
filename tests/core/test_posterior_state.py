"""Posteriors as objects: fitted in parts and anew, saved and loaded, and what they leave of the user's model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from laplace import FullLaplace, Laplace
from laplace.tuning import score_grid

from . import naive
from .models import CASES, loader, mlp
from .posteriors import SIX, close, dense_curvature, dense_precision, fitted, prior_of


@pytest.mark.parametrize("subset, structure", SIX)
def test_fit_without_override_adds(subset, structure):
    model, x, y = CASES["mlp"].make(n=7)
    whole = Laplace(model, "classification", subset, structure)
    whole.fit(loader(x, y))
    parts = Laplace(model, "classification", subset, structure)
    parts.fit(loader(x[:4], y[:4]), override=False)
    parts.fit(loader(x[4:], y[4:]), override=False)
    assert parts.n_data == whole.n_data == 7
    close(dense_curvature(parts), dense_curvature(whole), 1e-12)
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-14)
    parts.fit(loader(x, y))
    assert parts.n_data == 7
    assert torch.equal(dense_curvature(parts), dense_curvature(whole))


class OnlyBatches:
    """Batches, without a length and without a data set that has one."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("subset, structure", SIX)
def test_examples_are_counted_not_asked_for(subset, structure, backend):
    from laplace.curvature import backend_class

    model, x, y = CASES["mlp"].make(n=7)
    found = []
    for data in (OnlyBatches((x[:4], y[:4]), (x[4:], y[4:])), loader(x, y, batch_size=4)):
        la = Laplace(model, "classification", subset, structure, backend=backend_class(backend, "ggn")[0])
        la.fit(data)
        assert la.n_data == 7
        found.append(dense_curvature(la))
    assert torch.equal(*found)


@pytest.mark.parametrize("subset, structure", SIX)
def test_a_second_fit_forgets_the_first(subset, structure):
    """Whatever is cached from the first fit must not survive the second, nor an addition to it."""
    model, x, y = CASES["mlp"].make(n=7)
    la = Laplace(model, "classification", subset, structure)
    for first, override, data in (
        ((x[:3], y[:3]), True, (x[3:], y[3:])),
        ((x[:3], y[:3]), False, (x, y)),
    ):
        la.fit(loader(*first))
        used = la.log_marginal_likelihood(), la(x), la.sample(1), score_grid(la, loader(x, y), torch.ones(2))
        assert used[1].shape == (7, 3)
        la.fit(loader(x[3:], y[3:]), override=override)
        fresh = Laplace(model, "classification", subset, structure)
        fresh.fit(loader(*data))
        close(la.log_marginal_likelihood(), fresh.log_marginal_likelihood())
        close(la(x), fresh(x))
        close(score_grid(la, loader(x, y), torch.ones(2))[0], score_grid(fresh, loader(x, y), torch.ones(2))[0])
        draws = [posterior.sample(2, torch.Generator().manual_seed(0)) for posterior in (la, fresh)]
        truth = dense_precision(fresh)
        close(*[((d - fresh.mean) @ truth * (d - fresh.mean)).sum(1) for d in draws])


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("case", ["mlp", "regression"])
def test_state_dict_round_trip(case, subset, structure):
    noise = {"sigma_noise": 0.6} if case == "regression" else {}
    la = fitted(subset, structure, case, temperature=0.8, **noise)
    la.prior_precision = prior_of(la, "layerwise")
    la.prior_mean = 0.25
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    model, x, y = CASES[case].make()
    again = Laplace(model, CASES[case].likelihood, subset, structure)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert (again.n_data, again.n_outputs, again.temperature) == (la.n_data, la.n_outputs, la.temperature)
    for one, two in zip(again(x), la(x), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(again.sample(3, generators[0]), la.sample(3, generators[1]))
    again.fit(loader(x, y), override=False)
    assert again.n_data == 2 * la.n_data


@pytest.mark.parametrize("structure", ["full", "kron", "ekfac", "diag", "lowrank", "blockdiag", "gp"])
@pytest.mark.parametrize("ours, theirs", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_state_goes_on_in_a_model_of_another_precision(structure, ours, theirs):
    model, x, y = CASES["mlp"].make()
    model.float()  # weights that both types hold
    one, two = copy.deepcopy(model).to(ours), copy.deepcopy(model).to(theirs)
    la, again = Laplace(one, "classification", "all", structure), Laplace(two, "classification", "all", structure)
    la.fit(loader(x.to(ours), y))
    again.load_state_dict(la.state_dict())
    assert again(x.to(theirs)).dtype == theirs
    close(again(x.to(theirs)), la(x.to(ours)), 2e-6)
    if structure != "gp":
        assert again.sample(2).dtype == theirs
    if structure not in ("gp", "lowrank"):
        again.fit(loader(x.to(theirs), y), override=False)
        both = Laplace(two, "classification", "all", structure)
        both.fit(loader(torch.cat([x, x]).to(theirs), torch.cat([y, y])))
        close(again(x.to(theirs)), both(x.to(theirs)), 2e-6)


@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("subset, structure", SIX)
def test_whole_object_survives_torch_save(subset, structure, backend):
    from laplace.curvature import backend_class

    la = fitted(subset, structure, backend=backend_class(backend, "ggn")[0])
    la.optimize_prior_precision(n_steps=3)
    x = CASES["mlp"].make()[1]
    expected = la(x)
    buffer = io.BytesIO()
    torch.save(la, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), expected)
    assert type(again) is type(la)


@pytest.mark.parametrize(
    "subset, structure",
    [("all", s) for s in ("full", "kron", "diag", "blockdiag", "ekfac", "lowrank", "gp")] + [("last_layer", "kron")],
)
def test_a_model_that_was_converted_since_the_fit_needs_a_posterior_of_its_own(subset, structure):
    """Also where every number is the same in the other type; the state goes on."""
    model, x, y = CASES["mlp"].make(n=8)
    model, x = model.float(), x.float()
    la = Laplace(model, "classification", subset, structure)
    la.fit([(x, y)])
    model.double()
    uses = [lambda: la(x.double()), lambda: la.functional_samples(x.double())]
    if structure != "gp":
        uses += [lambda: la.sample(2), lambda: la(x.double(), pred_type="nn", link_approx="mc")]
    if structure in ("kron", "diag", "full", "blockdiag"):
        uses.append(lambda: la.fit([(x.double(), y)], override=False))
    for use in uses:
        with pytest.raises(
            ValueError, match=r"converted to torch.float64 since the fit in torch.float32.*load_state_dict\("
        ):
            use()
    new = Laplace(model, "classification", subset, structure)
    new.load_state_dict(la.state_dict())
    for use in (new, new.functional_samples):
        use(x.double())
    la.fit([(x.double(), y)])
    assert la(x.double()).dtype == torch.float64


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    la, x = fitted(), CASES["mlp"].make()[1]
    before, state = la(x), fitted(structure="kron").state_dict()
    with pytest.raises(ValueError, match="cls_name is 'KronLaplace', but this is 'FullLaplace'"):
        la.load_state_dict(state)
    with pytest.raises(ValueError, match="schema version 99"):
        la.load_state_dict({**la.state_dict(), "schema_version": 99})
    with pytest.raises(ValueError, match="likelihood is 'regression'"):
        la.load_state_dict({**la.state_dict(), "likelihood": "regression"})
    with pytest.raises(ValueError, match="fitted at other parameters"):
        la.load_state_dict({**la.state_dict(), "mean": la.mean + 1})
    state = la.state_dict()
    with pytest.raises(ValueError, match="does not fit|do not fit"):
        la.load_state_dict({**state, "sums": {"loss": state["sums"]["loss"]}})
    with pytest.raises(ValueError, match="NaN or Inf"):
        la.load_state_dict({**state, "sums": {**state["sums"], "full": state["sums"]["full"] * float("nan")}})
    assert torch.equal(la(x), before)


# --- the user's model ------------------------------------------------------------------------------------------------


class Modes(nn.Module):
    """Batch norm and dropout, with training flags that differ between modules."""

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.drop, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.bn(self.first(x)))))


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("subset, structure", SIX)
def test_the_model_is_left_as_it_was_found(subset, structure, backend):
    from laplace.curvature import backend_class

    torch.manual_seed(0)
    model = Modes().double()
    if backend == "curvlinops":
        model.bn.requires_grad_(False)  # it has no Kronecker factors for normalisation
    model.train()
    model.bn.eval()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    flags = [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    la = Laplace(model, "classification", subset, structure, backend=backend_class(backend, "ggn")[0])
    la.fit(loader(x, y))
    la(x)
    la(x, link_approx="mc", n_samples=3)
    la(x, pred_type="nn", link_approx="mc", n_samples=3)
    la.predictive_samples(x, n_samples=2)
    la.log_marginal_likelihood()
    la.optimize_prior_precision(n_steps=2)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader(x, y), grid_size=3, pred_type="nn", link_approx="mc", n_samples=2
    )
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ] == hooks


@pytest.mark.parametrize("subset, structure", SIX)
def test_training_flags_do_not_change_the_fit(subset, structure):
    torch.manual_seed(0)
    model = Modes().double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    results = []
    for mode in (True, False):
        model.train(mode)
        la = Laplace(model, "classification", subset, structure)
        la.fit(loader(x, y))
        results.append(
            (
                dense_curvature(la),
                la(x),
                la(x, pred_type="nn", link_approx="mc", generator=torch.Generator().manual_seed(0)),
            )
        )
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_failed_fit_leaves_the_earlier_one():
    """The failing batch must not leave its mark either: here it would decide differently which layers are covered."""
    model, x, y = CASES["used-outside"].make()
    la = Laplace(model, "classification", "all", "kron")
    la.fit(loader(x, y))
    before, rows = la(x), list(la.coverage)
    for bad_x, bad_y in ((x * float("nan"), y), (x * 0, y + 7)):
        with pytest.raises(ValueError):
            la.fit(loader(bad_x, bad_y))
        assert list(la.coverage) == rows
        assert la.n_data == 5
        assert torch.equal(la(x), before)
    with pytest.raises(ValueError, match="empty"):
        la.fit([])
    assert torch.equal(la(x), before)


def test_a_posterior_that_is_not_positive_definite_says_what_to_do():
    from laplace.linalg.dense import invsqrt_precision

    with pytest.raises(ValueError, match="not positive definite.*raise the prior precision"):
        invsqrt_precision(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert isinstance(fitted(), FullLaplace)
    assert (
        naive.relative_error(
            invsqrt_precision(torch.diag(torch.tensor([4.0, 9.0]))), torch.diag(torch.tensor([0.5, 1 / 3]))
        )
        < 1e-6
    )


def test_mean_is_the_parameter_vector():
    la = fitted()
    assert torch.equal(la.mean, nn.utils.parameters_to_vector(mlp_parameters(la)).detach())


def mlp_parameters(la):
    return list(la.model.parameters())


def test_single_precision_posterior_works():
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(8, 3), torch.randint(3, (8,))
    for subset, structure in SIX:
        la = Laplace(model, "classification", subset, structure)
        la.fit(loader(x, y))
        assert la(x).dtype == torch.float32
        assert torch.allclose(la(x).sum(-1), torch.ones(8), atol=1e-5)
        assert la.log_marginal_likelihood().isfinite()
