"""Prior tuning: stationary points of the evidence, and one-pass grids against one value at a time."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.distributions import Normal
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from laplace import Laplace, NonFiniteError, scoring, tuning
from laplace.tuning import prior_precision_grid, score_grid, select_prior_precision
from laplace.utils import validate
from laplace.utils.metrics import classification_scores

from .models import CASES, loader, mlp
from .posteriors import COMBINATIONS, SIX, close, fitted, prior_of

GRID = torch.tensor([0.01, 0.3, 1.0, 7.0, 200.0], dtype=torch.float64)
LINKS = ("probit", "mc", "bridge", "bridge_norm")


def validation(case="mlp", n=7):
    _, x, y = CASES[case].make(n=n, seed=5)
    return x, y


def nll(probabilities, y):
    return -probabilities[torch.arange(len(y)), y].log().sum()


# --- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure", SIX)
def test_marglik_finds_the_best_scalar(subset, structure):
    la = fitted(subset, structure)
    la.optimize_prior_precision(n_steps=300)
    found = la.prior_precision
    assert found.shape == (1,)
    assert not found.requires_grad
    scan = torch.logspace(-3, 3, 2001, dtype=torch.float64)
    evidence = torch.stack([la.log_marginal_likelihood(v) for v in scan])
    best = scan[evidence.argmax()]
    assert 0.002 < float(best) < 500  # inside, so that the comparison means something
    assert float(found) == pytest.approx(float(best), rel=10 ** (6 / 2000) - 1)


@pytest.mark.parametrize("subset, structure, prior", COMBINATIONS)
def test_marglik_reaches_a_stationary_point_of_every_structure(subset, structure, prior):
    la = fitted(subset, structure, "regression")
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(prior_structure=prior, n_steps=600, lr=0.05)
    expected = {"scalar": 1, "layerwise": la.n_layers, "diag": la.n_params}[prior]
    assert la.prior_precision.shape == (expected,)
    log_prior = la.prior_precision.log().requires_grad_(True)
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(log_prior.exp()), log_prior)
    assert float(la.log_marginal_likelihood().detach()) > float(before)
    # d evidence / d log prior is 1/2 (1 - prior * variance - prior * weight^2) per parameter: of order 1 elsewhere; a
    # weight that is nearly zero moves its prior off to infinity, where the gradient vanishes slowly
    assert float(gradient.abs().max()) < 0.05


def test_marglik_starts_where_it_is_told():
    la = fitted(structure="kron")
    start = prior_of(la, "layerwise")
    la.optimize_prior_precision(init_prior_prec=start, n_steps=0)
    assert torch.allclose(la.prior_precision, start)
    la.optimize_prior_precision(init_prior_prec=3.0, prior_structure="layerwise", n_steps=0)
    assert la.prior_precision.tolist() == pytest.approx([3.0] * la.n_layers)


def test_a_failing_marglik_keeps_the_prior():
    la = fitted(structure="kron")
    la.prior_precision = 2.5
    with pytest.raises(ValueError, match="positive and finite|NaN|inf"):
        la.optimize_prior_precision(lr=1e6, n_steps=5)
    assert la.prior_precision.tolist() == [2.5]


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("link", LINKS)
def test_one_pass_scores_equal_one_value_at_a_time(link, subset, structure):
    la, (x, y) = fitted(subset, structure), validation()
    la.prior_precision = prior_of(la, "layerwise")
    before = la.prior_precision
    total, n = score_grid(la, loader(x, y, 3), GRID, link_approx=link, n_samples=20, seed=4)
    assert (n, total.dtype, total.shape) == (7, torch.float64, (5,))
    assert la.prior_precision is before
    alone = []
    for value in GRID:
        la.prior_precision = value
        score = 0.0
        for xb, yb in loader(x, y, 3):
            p = la(xb, link_approx=link, n_samples=20, generator=torch.Generator().manual_seed(4))
            score = score + nll(p, yb)
        alone.append(score)
    close(total, torch.stack(alone), 1e-9)
    assert float(total.std()) > 1e-3
    for i, value in enumerate(GRID):  # a value's score does not depend on its neighbours
        single, _ = score_grid(la, loader(x, y, 3), value[None], link_approx=link, n_samples=20, seed=4)
        assert float(single) == pytest.approx(float(total[i]), rel=1e-9)


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("case", ["mlp", "regression"])
def test_sampled_networks_are_scored_with_the_same_draws(case, subset, structure):
    la, (x, y) = fitted(subset, structure, case), validation(case)
    before = la.prior_precision
    total, n = score_grid(la, loader(x, y, 3), GRID, pred_type="nn", link_approx="mc", n_samples=5, seed=4)
    assert la.prior_precision is before
    alone = []
    for value in GRID:
        la.prior_precision = value
        score = 0.0
        for xb, yb in loader(x, y, 3):
            generator = torch.Generator().manual_seed(4)
            p = la(xb, pred_type="nn", link_approx="mc", n_samples=5, generator=generator)
            score = score + (nll(p, yb) if case == "mlp" else -Normal(p[0], (p[1] + 1).sqrt()).log_prob(yb).sum())
        alone.append(score)
    close(total, torch.stack(alone), 1e-9)
    assert n == y.numel()


@pytest.mark.parametrize("subset, structure", SIX)
def test_a_regression_is_scored_by_its_gaussian_with_the_noise(subset, structure):
    """The means do not depend on the prior; the variances do."""
    la, (x, y) = fitted(subset, structure, "regression"), validation("regression")
    la.sigma_noise = 0.7
    total, n = score_grid(la, loader(x, y), GRID)
    assert n == 14
    for prior, score in zip(GRID, total, strict=True):
        la.prior_precision = prior
        mean, covariance = la(x)
        variance = covariance.diagonal(dim1=1, dim2=2) + 0.49
        assert float(score) == pytest.approx(float(-Normal(mean, variance.sqrt()).log_prob(y).sum()))
    assert len(set(total.tolist())) == len(GRID)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y), grid_size=9)
    grid = prior_precision_grid(size=9)
    assert la.prior_precision.item() == pytest.approx(grid[score_grid(la, loader(x, y), grid)[0].argmin()].item())


def certain(scale=150.0):
    """A classifier of float32 that is wrong about one example by a factor of e^-120 and more."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(scale * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    x, y = torch.tensor([[1.0, 0.2], [0.1, 1.0], [0.9, 0.1]]), torch.tensor([0, 1, 1])
    la = Laplace(model, "classification", "all", "kron")
    la.fit(loader(x, y))
    la.prior_precision = 1e6
    return la, x, y


@pytest.mark.parametrize("pred_type, link", [*(("glm", link) for link in LINKS), ("nn", "mc")])
def test_scores_are_not_those_of_probabilities_that_underflow(pred_type, link):
    la, x, y = certain()
    total, _ = score_grid(la, loader(x, y), torch.tensor([1e6]), link, pred_type, n_samples=4)
    model, x = la.model.double(), x.double()
    exact = Laplace(model, "classification", "all", "kron", prior_precision=1e6)
    exact.fit(loader(x, y))
    generator = torch.Generator().manual_seed(0)
    logs = exact(x, pred_type, link_approx=link, n_samples=4, generator=generator, log_probs=True)
    truth = float(-logs.gather(1, y[:, None]).sum())
    assert 100 < truth < 200 if "bridge" not in link else truth > 0
    assert float(total) == pytest.approx(truth, rel=1e-2 if pred_type == "nn" or link == "mc" else 1e-4)
    scores = classification_scores(logs.exp(), y, logs)
    assert float(scores["nll"].sum()) == pytest.approx(truth)
    assert torch.allclose(logs.exp().sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("subset, structure", SIX)
def test_scores_add_up_over_shards(subset, structure):
    la, (x, y) = fitted(subset, structure), validation()
    whole, n = score_grid(la, loader(x, y), GRID)
    shards = [score_grid(la, loader(x[a:b], y[a:b]), GRID) for a, b in ((0, 2), (2, 3), (3, 7))]
    close(sum(total for total, _ in shards), whole, 1e-12)
    assert sum(m for _, m in shards) == n


def test_a_sweep_in_chunks_is_the_same_sweep(monkeypatch):
    la, (x, y) = fitted("all", "kron"), validation()
    whole, _ = score_grid(la, loader(x, y), GRID, link_approx="bridge")
    monkeypatch.setattr(scoring, "_SWEEP", 40)
    chunked, _ = score_grid(la, loader(x, y), GRID, link_approx="bridge")
    close(chunked, whole, 1e-12)


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("subset, structure", SIX)
def test_gridsearch_takes_the_lowest_score(subset, structure):
    model, x, y = CASES["mlp"].make(n=40)
    with torch.no_grad():
        model[2].weight *= 4  # overconfident
    flipped = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.25  # and right about three in four
    y = (model(x).argmax(-1) + flipped) % 3
    la = Laplace(model, "classification", subset, structure)
    la.fit(loader(x, y, 16))
    grid = prior_precision_grid(-3, 5, 30)
    total, _ = score_grid(la, loader(x, y, 16), grid)
    assert int(total.argmin()) < 29  # better than no uncertainty at all
    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader(x, y, 16), log_prior_prec_min=-3, log_prior_prec_max=5, grid_size=30
    )
    assert float(la.prior_precision) == pytest.approx(float(grid[total.argmin()]))


def test_custom_losses_see_all_predictions_and_each_value_alone():
    la, (x, y) = fitted("all", "kron"), validation()
    seen = []

    def loss(predictions, targets):
        seen.append(predictions)
        assert predictions.shape == (7, 3)
        assert torch.equal(targets, y)
        return nll(predictions, targets)

    total, _ = score_grid(la, loader(x, y, 3), prior_precision_grid(-1, 1, 5))
    scores = tuning._score_with(la, loader(x, y, 3), prior_precision_grid(-1, 1, 5), loss, "probit", "glm", 10)
    close(scores, total)
    assert len(seen) == 5
    largest = []
    for value in prior_precision_grid(-1, 1, 5):
        la.prior_precision = value
        largest.append(la(x).max())
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=loader(x, y, 3),
        loss=lambda p, t: (p.max() - largest[3]).abs(),
        log_prior_prec_min=-1,
        log_prior_prec_max=1,
        grid_size=5,
    )
    assert float(la.prior_precision) == pytest.approx(10**0.5)


@pytest.mark.parametrize("loss", [None, nll, MulticlassAccuracy(3)])
@pytest.mark.parametrize("how", [{"pred_type": "glm"}, {"pred_type": "nn", "link_approx": "mc"}])
def test_validation_examples_without_a_finite_output_are_named(how, loss):
    la, (x, y) = fitted("all", "diag"), validation()
    x[5] = torch.nan
    with pytest.raises(NonFiniteError, match="output is NaN or Inf .*: indices 5. Nothing is scored with them"):
        la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y, 3), loss=loss, grid_size=3, **how)
    if loss is None:
        with pytest.raises(NonFiniteError, match="indices 5"):
            la.optimize_logit_temperature(loader(x, y, 3), n_samples=3, **how)
    assert float(la.prior_precision) == 1


@pytest.mark.parametrize("metric", [MulticlassAccuracy(3), MulticlassCalibrationError(3, n_bins=5)])
def test_torchmetrics_are_copied_per_value(metric):
    la, (x, y) = fitted("all", "diag"), validation(n=20)
    metric.update(torch.eye(3), torch.tensor([0, 1, 1]))  # a metric that is in use elsewhere
    used = float(metric.compute())
    scores = tuning._score_with(la, loader(x, y, 3), GRID, metric, "probit", "glm", 10)
    for value, score in zip(GRID, scores, strict=True):
        la.prior_precision = value
        fresh = type(metric)(3, **({"n_bins": 5} if isinstance(metric, MulticlassCalibrationError) else {}))
        assert float(score) == pytest.approx(float(fresh(la(x), y)), abs=1e-6)
    assert float(metric.compute()) == used


@pytest.mark.parametrize("pred_type, link", [("glm", "probit"), ("nn", "mc")])
def test_custom_losses_of_regression_see_the_variances_of_every_value(pred_type, link):
    """As ``validate`` calls them: the mean of the linearised network is the same for every prior, its variance is not."""
    la, (x, y) = fitted("all", "kron", "regression"), validation("regression")

    def gaussian(mean, variance, targets):
        variance = variance.diagonal(dim1=1, dim2=2) if variance.ndim == 3 else variance
        return torch.nn.functional.gaussian_nll_loss(mean, targets, variance + 0.1)

    scores = tuning._score_with(la, [(x, y)], GRID, gaussian, link, pred_type, 50)
    assert len(set(scores.tolist())) == len(GRID)
    if pred_type == "glm":
        for value, score in zip(GRID, scores, strict=True):
            la.prior_precision = value
            assert float(score) == pytest.approx(validate(la, loader(x, y, 3), gaussian), rel=1e-10)
    arguments = {"log_prior_prec_min": -2, "log_prior_prec_max": 2, "grid_size": 5, "n_samples": 50}
    la.optimize_prior_precision(
        pred_type, "gridsearch", val_loader=[(x, y)], loss=gaussian, link_approx=link, **arguments
    )
    grid = prior_precision_grid(-2, 2, 5)
    best = grid[tuning._score_with(la, [(x, y)], grid, gaussian, link, pred_type, 50).argmin()]
    assert float(la.prior_precision) == pytest.approx(float(best))


def test_torchmetrics_for_regression():
    la, (x, y) = fitted("all", "diag", "regression"), validation("regression")
    scores = tuning._score_with(la, loader(x, y, 3), GRID, MeanSquaredError(), "mc", "nn", 5)
    alone = tuning._score_with(la, loader(x, y, 3), GRID, lambda f, v, y: (f - y).square().mean(), "mc", "nn", 5)
    assert torch.allclose(scores, alone, rtol=1e-6)


@pytest.mark.parametrize("subset, structure", SIX)
def test_a_grid_is_one_pass_over_the_data(subset, structure):
    """However many values there are: every batch goes through the network once."""
    la, (x, y) = fitted(subset, structure), validation(n=9)
    batches, rows = Counted([(x[:4], y[:4]), (x[4:], y[4:])]), []
    network = la.model.model if subset == "last_layer" else la.model
    handle = network.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=50)
    handle.remove()
    assert batches.passes == 1
    assert rows == [4, 5]


class Counted(list):
    """Batches that know how often they were asked for."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize(
    "subset, structure, expected", [("all", "full", 1), ("last_layer", "full", 1), ("all", "kron", 4)]
)
def test_the_evidence_of_a_scalar_prior_costs_the_eigenvalues_once(subset, structure, expected, monkeypatch):
    """Of the whole matrix, or of each Kronecker factor; no eigenvectors, and no factorisation at any step."""
    la, counts = fitted(subset, structure), {"eigvalsh": 0, "eigh": 0, "cholesky_ex": 0}
    for name in counts:
        plain = getattr(torch.linalg, name)

        def counted(*args, plain=plain, name=name, **kwargs):
            counts[name] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    la.optimize_prior_precision(method="marglik", n_steps=30)
    la.log_marginal_likelihood(torch.tensor(3.0))
    assert counts == {"eigvalsh": expected, "eigh": 0, "cholesky_ex": 0}


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_the_evidence_is_the_same_number_before_and_after_eigenvectors_were_asked_for(structure):
    la, later = fitted("all", structure), fitted("all", structure)
    before = la.log_marginal_likelihood(torch.tensor(3.0))
    la(torch.randn(2, 3, dtype=torch.float64))
    later(torch.randn(2, 3, dtype=torch.float64))
    if structure == "kron":
        later.prior_precision = 3.0
        assert float(later.posterior_precision.logdet()) == pytest.approx(
            float(later.log_det_posterior_precision), rel=1e-13
        )
    assert la.log_marginal_likelihood(torch.tensor(3.0)) == before
    assert float(later.log_marginal_likelihood(torch.tensor(3.0))) == pytest.approx(float(before), rel=1e-13)


# --- choosing --------------------------------------------------------------------------------------------------------


def test_grid_values():
    assert prior_precision_grid(-2, 2, 5).tolist() == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert prior_precision_grid(0, 3, 4, base=2).tolist() == pytest.approx([1, 2, 4, 8])
    assert prior_precision_grid().shape == (100,)
    assert prior_precision_grid(1, 1, 1).tolist() == pytest.approx([10])
    for arguments in ((1, -1, 5), (0, 1, 0)):
        with pytest.raises(ValueError, match="is empty; give size >= 1 and min <= max"):
            prior_precision_grid(*arguments)


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    "scores, best, edge",
    [
        ([3, 1, 2, 4, 5], 1, False),
        ([nan, 3, 2, 4, nan], 2, False),
        ([nan, 3, inf, 1, -inf], 3, False),
        ([0, 1, 2, 3, 4], 0, True),
        ([4, 3, 2, 1, 0], 4, True),
        ([1, 1, 1, 1, 1], 2, False),
        ([nan, nan, nan, nan, 1], 4, True),
    ],
)
def test_selection(scores, best, edge):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert select_prior_precision(GRID, torch.tensor(scores, dtype=torch.float64)) == GRID[best]
    messages = [str(w.message) for w in caught]
    assert len(messages) == edge
    assert all(f"{float(GRID[best]):.3g} lies on the edge of the grid [0.01, 200]; widen it" in m for m in messages)


def test_selection_without_a_finite_score_is_refused():
    with pytest.raises(ValueError, match="No prior precision on the grid has a finite score"):
        select_prior_precision(GRID, torch.tensor([nan, inf, nan, nan, -inf]))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"method": "CV"}, "method='CV' is unknown; valid values are 'marglik', 'gridsearch'"),
        ({"prior_structure": "block"}, "valid values are 'scalar', 'diag', 'layerwise'"),
        ({"prior_structure": "diag"}, "scalar or layerwise prior precision .* not a diagonal one"),
        ({"method": "gridsearch"}, "needs val_loader"),
        ({"method": "gridsearch", "val_loader": []}, "validation data is empty"),
        ({"method": "gridsearch", "val_loader": [], "loss": nll}, "validation data is empty"),
        ({"method": "gridsearch", "val_loader": "LOADER", "pred_type": "gp"}, "valid here are 'glm' and 'nn'"),
        ({"method": "gridsearch", "val_loader": "LOADER", "pred_type": "nn"}, "only link_approx='mc'"),
        ({"method": "gridsearch", "val_loader": "LOADER", "loss": lambda p, y: nan}, "finite score"),
    ],
)
def test_impossible_tuning_is_refused_and_keeps_the_prior(kwargs, message):
    la = fitted(structure="kron")
    if kwargs.get("val_loader") == "LOADER":
        kwargs = {**kwargs, "val_loader": loader(*validation())}
    with pytest.raises(ValueError, match=message):
        la.optimize_prior_precision(**kwargs)
    assert la.prior_precision.tolist() == [1.0]


def test_verbose_and_progress_bar(capsys):
    la = fitted(structure="diag")
    la.optimize_prior_precision(n_steps=1, verbose=True, progress_bar=True)
    assert "Optimized prior precision is" in capsys.readouterr().out


@pytest.mark.parametrize("pred_type, link", [("glm", "probit"), ("nn", "mc")])
def test_validation_targets_that_do_not_fit_are_refused(pred_type, link):
    """A regression's (n,) against (n, 1) would be compared value by value with every other one."""
    model = mlp(outputs=1).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "diag")
    la.fit([(x, y)])
    with pytest.raises(ValueError, match=r"Targets of shape \(6,\) do not match outputs of shape \(6, 1\)"):
        la.optimize_prior_precision(pred_type, "gridsearch", val_loader=[(x, y[:, 0])], link_approx=link)
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", "diag")
    la.fit([(x, y)])
    with pytest.raises(ValueError, match="Label 3 of example 5 is out of range"):
        la.optimize_prior_precision(
            pred_type, "gridsearch", val_loader=[(x, y), (x[:1], y[:1] * 0 + 3)], link_approx=link
        )


def test_a_grid_search_shows_its_progress(capsys):
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", "diag")
    la.fit([(x, y)])
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=3, progress_bar=True)
    assert "[Scoring prior precisions]" in capsys.readouterr().err
