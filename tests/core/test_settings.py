"""What is set after construction, after a fit or by a state counts everywhere, or is refused."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from laplace import DiagLaplace, KronLaplace, Laplace
from laplace.curvature import NativeEF, NativeGGN
from laplace.enums import Likelihood

from .models import CASES, loader, mlp
from .posteriors import SIX

NAN, INF = float("nan"), float("inf")


def make(case="mlp", structure="kron", subset="all", **kwargs):
    model, x, y = CASES[case].make(n=6)
    la = Laplace(model, CASES[case].likelihood, subset, structure, **kwargs)
    la.fit(loader(x, y))
    return la, x, y


def stored(la):
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_state_has_the_damping():
    la, _, _ = make(damping=True, prior_precision=2.0)
    other = KronLaplace(la.model, "classification")
    other.load_state_dict(stored(la))
    assert other.damping is True
    assert other.log_marginal_likelihood().item() == la.log_marginal_likelihood().item()


def test_a_state_has_the_reduction_of_features():
    class LastToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.token(x)))[:, -1]

    torch.manual_seed(0)
    model, x, y = LastToken().double(), torch.randn(6, 5, 3).double(), torch.randint(2, (6,))
    la = Laplace(model, "classification", "last_layer", "full", feature_reduction="pick_last")
    la.fit(loader(x, y))
    other = Laplace(model, "classification", "last_layer", "full")
    other.load_state_dict(stored(la))
    assert other.feature_reduction == "pick_last"
    assert torch.equal(other(x), la(x))


def test_a_state_without_settings_still_loads():
    """As written before they were part of it."""
    la, x, _ = make()
    state = {k: v for k, v in stored(la).items() if k not in ("damping", "estimator")} | {"schema_version": 1}
    other = KronLaplace(la.model, "classification")
    other.load_state_dict(state)
    assert torch.equal(other(x), la(x))


@pytest.mark.parametrize("subset, structure", SIX)
def test_curvature_of_another_estimator_is_not_added(subset, structure):
    la, x, y = make(subset=subset, structure=structure)
    other = Laplace(
        la.model if subset == "all" else la.model.model, "classification", subset, structure, backend=NativeEF
    )
    other.load_state_dict(stored(la))
    before = other.log_marginal_likelihood()
    with pytest.raises(ValueError, match="estimated by 'ggn' and by 'ef' cannot be added.*fit\\(override=True\\)"):
        other.fit(loader(x, y), override=False)
    assert torch.equal(other.log_marginal_likelihood(), before)
    with pytest.raises(ValueError, match="'ggn' and by 'ef' cannot be added"):
        la.sums.merge(sums_of(other, x, y))
    other.fit(loader(x, y))
    assert other.sums.estimator == "ef"


def sums_of(la, x, y):
    sums = la.zero_sums()
    la.accumulate(sums, x, y)
    return sums


def test_a_gp_is_not_conditioned_with_another_estimator():
    la, _, _ = make(structure="gp")
    other = Laplace(la.model, "classification", "all", "gp", backend=NativeEF)
    with pytest.raises(ValueError, match="estimator 'ggn', but this posterior's backend is NativeEF"):
        other.load_state_dict(stored(la))


# --- weights ---------------------------------------------------------------------------------------------------------


def step(model, name):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 1e-3


@pytest.mark.parametrize("subset, structure, name", [(*six, "0.weight") for six in SIX] + [("all", "gp", "2.bias")])
def test_a_prediction_at_other_weights_is_refused(subset, structure, name):
    """Of a last layer, weights before it count as well."""
    model, x, y = CASES["mlp"].make(n=6)
    la = Laplace(model, "classification", subset, structure)
    la.fit(loader(x, y))
    before = la(x)
    step(model, name)
    predictions = [lambda: la(x), lambda: la.functional_samples(x)]
    if subset == "last_layer":
        predictions.append(lambda: la.functional_variance_fast(x))
    for predict in predictions:
        with pytest.raises(
            ValueError, match=f"weights have changed since the fit \\((model.)?{name}\\).*Call fit again"
        ):
            predict()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] -= 1e-3
    if subset == "all":  # exactly as before, up to rounding
        model.load_state_dict(CASES["mlp"].make(n=6)[0].state_dict())
    assert torch.allclose(la(x), before)
    step(model, name)
    la.fit(loader(x, y))
    la(x)


def test_weights_that_bypass_autograd_or_are_replaced_are_noticed():
    la, x, _ = make()
    la.model[0].weight.data.add_(1.0)  # counts no version
    with pytest.raises(ValueError, match="changed since the fit \\(0.weight\\)"):
        la(x)
    la, x, _ = make()
    la.model[2].bias = nn.Parameter(la.model[2].bias.detach().clone())
    with pytest.raises(ValueError, match="one that was replaced"):
        la(x)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_running_statistics_that_have_changed_are_noticed(subset):
    """A forward pass in training mode changes them, and no weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    la = Laplace(model, "classification", subset, "kron")
    la.fit(loader(x, y))
    la(x)
    model.train()(3 * x)
    with pytest.raises(ValueError, match="changed since the fit \\((model.)?0.running_mean, (model.)?0.running_var\\)"):
        la(x)
    la.fit(loader(x, y))
    la(x)


class Monitored(nn.Linear):
    """Keeps a figure of what it has seen, which is no part of its function."""

    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("running_norm", torch.zeros(()))

    def forward(self, x):
        out = super().forward(x)
        self.running_norm.lerp_(out.detach().norm(), 0.1)
        return out


def test_what_a_module_counts_is_no_running_statistic():
    la, x = Laplace(Monitored(), "classification", "all", "kron"), torch.randn(6, 3)
    la.fit(loader(x, torch.arange(6) % 2))
    before = la(x)
    la.model(x)
    assert torch.equal(la(x), before)


def test_a_frozen_module_that_is_gone_is_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False), nn.Linear(3, 2))
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    la = Laplace(model, "classification", "all", "kron")
    la.fit(loader(x, y))
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match="changed since the fit \\(0.weight, 0.bias, 0.running_mean"):
        la(x)


def test_a_further_fit_at_other_weights_says_so():
    la, x, y = make(structure="diag")
    step(la.model, "0.weight")
    with pytest.warns(
        UserWarning, match="adds curvature at other weights: 0.weight changed since the earlier fit over 6"
    ):
        la.fit(loader(x, y), override=False)
    assert la.n_data == 12


# --- likelihood ------------------------------------------------------------------------------------------------------


def test_a_likelihood_is_set_by_name():
    la, x, _ = make("regression")
    before, mean = la.log_likelihood, la(x)[0]
    la.likelihood = "regression"
    assert la.likelihood is Likelihood.REGRESSION
    assert torch.equal(la.log_likelihood, before)
    assert torch.equal(la(x)[0], mean)
    for bad in ("bogus", None, 3):
        with pytest.raises(ValueError, match="is unknown; valid values are 'regression'"):
            la.likelihood = bad
    with pytest.raises(
        ValueError, match="fitted under likelihood='regression'; its loss .* not those of 'classification'"
    ):
        la.likelihood = "classification"
    assert la.likelihood is Likelihood.REGRESSION


def test_a_likelihood_set_before_the_fit_is_the_one_that_is_fitted():
    model, x, y = CASES["regression"].make(n=6)
    la = DiagLaplace(model, "classification")
    _ = la.backend
    la.likelihood = "regression"
    la.fit(loader(x, y))
    assert torch.equal(la.H, make("regression", "diag")[0].H)
    la = Laplace(model, "regression", "all", "full", sigma_noise=0.3)
    with pytest.raises(ValueError, match="sigma_noise=0.3.* has no meaning for classification"):
        la.likelihood = "classification"
    with pytest.raises(ValueError, match="'reward_modeling' has no 'full' posterior"):
        la.likelihood = "reward_modeling"
    assert la.likelihood is Likelihood.REGRESSION


def test_a_backend_s_likelihood_is_set_by_name():
    model, x, y = CASES["regression"].make(n=6)
    backend = NativeGGN(model, "classification")
    backend.likelihood = "regression"
    assert backend.factor == 0.5
    assert isinstance(backend.lossfunc, nn.MSELoss)
    assert torch.equal(backend.diag(x, y)[1], NativeGGN(model, "regression").diag(x, y)[1])
    with pytest.raises(ValueError, match="likelihood='bogus' is unknown"):
        backend.likelihood = "bogus"


# --- structure -------------------------------------------------------------------------------------------------------


def test_damping_set_after_use_counts():
    la, x, _ = make()
    _ = la.H
    la.damping = True
    fresh, _, _ = make(damping=True)
    assert la.log_marginal_likelihood().item() == fresh.log_marginal_likelihood().item()
    assert torch.equal(la(x), fresh(x))
    assert la.H.eigenvectors[0][0] is not None


def test_enable_backprop_set_on_a_last_layer_reaches_the_features():
    model, x, y = CASES["regression"].make(n=6)
    la = Laplace(model, "regression", "last_layer", "full")
    la.fit(loader(x, y))
    la.enable_backprop = True
    x.requires_grad_()
    (slope,) = torch.autograd.grad(la(x)[1].diagonal(dim1=1, dim2=2).sum(), x)
    assert float(slope.norm()) > 0


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite_are_refused(value):
    for mean in (value, torch.full((31,), value)):
        with pytest.raises(ValueError, match="prior_mean must be finite, but holds (nan|inf|-inf)"):
            Laplace(mlp(), "classification", "all", "diag", prior_mean=mean)
    with pytest.raises(ValueError, match="sigma_noise must be positive and finite"):
        Laplace(mlp(), "regression", "all", "diag", sigma_noise=value)
    with pytest.raises(ValueError, match="temperature=.* must be positive and finite"):
        Laplace(mlp(), "regression", "all", "diag", temperature=value)


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm1d(4),
        nn.BatchNorm1d(4),
    ],
    ids=lambda norm: f"{type(norm).__name__}-{norm.affine}-{norm.track_running_stats}",
)
def test_the_derivative_of_the_variance_passes_norms(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double().eval()
    x, y = torch.randn(1, 2, 5).double(), torch.randn(1, 2).double()
    la = Laplace(model, "regression", "all", "diag", enable_backprop=True)
    la.fit([(x, y)])
    assert torch.autograd.gradcheck(lambda z: la(z)[1].diagonal(dim1=1, dim2=2).sum(), (x.requires_grad_(),), eps=1e-5)
