"""Searches on validation data in jobs: against closed forms, on beyond the range they begin with, and never worse than MAP."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import tuning_cases
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy
from tuning_cases import config, log_losses, posterior, tuned

from laplace.likelihoods.comparison import paired_differences
from laplace.likelihoods.scores import log_probability_scores
from laplace_dist import fit
from laplace_dist.errors import RunFailed
from laplace_dist.report.metrics import show_result
from laplace_dist.run import tunings
from laplace_dist.run.checkpoint import Checkpoint

STEP = 10**0.2  # of the default lattice


# ------------------------------------------------------------------ regression


def marginal(x, y, line, prior, noise):
    """Mean negative log likelihood of validation points under Bayesian linear regression, by dense algebra in numpy."""
    train = tuning_cases.points("train").tensors[0].numpy()
    covariance = np.linalg.inv(train.T @ train / noise**2 + prior * np.eye(train.shape[1]))
    variance = np.einsum("ni,ij,nj->n", x, covariance, x)[:, None] + noise**2
    return float(np.mean((y - x @ line.T) ** 2 / variance + np.log(2 * np.pi * variance)) / 2)


def test_a_linear_gaussian_models_prior_and_noise_are_the_best_of_all(tmp_path):
    chosen = config(tmp_path, "line")
    _, manifest, said = tuned(chosen)
    la = posterior(chosen, tuning_cases.line())
    x, y = (t.numpy() for t in tuning_cases.points("val").tensors)
    line = tuning_cases.line().weight.detach().numpy()

    def best_noise(log_ratio):  # of the prior precision to that of the noise
        loss = lambda u: marginal(x, y, line, 10**log_ratio / 10 ** (2 * u), 10**u)  # noqa: E731
        return minimize_scalar(loss, bounds=(-3, 2), method="bounded", options={"xatol": 1e-10})

    lattice = np.arange(-8, 8.01, 0.2)
    ratio = min(lattice, key=lambda value: best_noise(value).fun)
    noise = 10 ** best_noise(ratio).x
    assert la.sigma_noise.item() == pytest.approx(noise, rel=1e-5)
    assert la.prior_precision.item() == pytest.approx(10**ratio / noise**2, rel=1e-5)
    assert 0.2 < noise < 0.5 and -4 < ratio < 4
    again = marginal(x, y, line, la.prior_precision.item(), la.sigma_noise.item())
    fine = [loss for scored in manifest["search"]["rounds"] if not scored["coarse"] for loss in scored["losses"]]
    assert min(fine) == pytest.approx(again, rel=1e-7), "of 41 values most are interpolated, to 2e-5 of the variance"
    of_map = math.sqrt(float(np.mean((y - x @ line.T) ** 2)))
    assert manifest["search"]["map_noise"] == pytest.approx(of_map)
    assert manifest["search"]["rounds"][0]["map"] == pytest.approx((math.log(2 * math.pi * of_map**2) + 1) / 2)
    assert manifest["search"]["limit"] is None and manifest["search"]["helps"]
    assert f"observation noise {noise:.4g}" in said
    drawn = dict(tunings.curve(manifest))
    assert min(drawn, key=drawn.get) == pytest.approx(la.prior_precision.item())


def test_the_table_says_which_noise_it_is_of(tmp_path, capsys):
    chosen = config(tmp_path, "line", skip_evaluate=False)
    result = fit(chosen.model_copy(update={"ray_address": "inline"}))
    (text,) = [text for text in result.notes if "noise" in text]
    la = posterior(chosen, tuning_cases.line())
    assert (
        text == f"The NLL of MAP and of Laplace is that under the tuned observation noise, {la.sigma_noise.item():.4g}."
    )
    x, y = tuning_cases.points("test").tensors
    truth = -torch.distributions.Normal(tuning_cases.line()(x), la.sigma_noise).log_prob(y).mean()
    assert result.metrics["map"]["nll"] == pytest.approx(float(truth))


def test_a_noise_that_was_not_tuned_is_said(tmp_path):
    chosen = config(tmp_path, "line", skip_evaluate=False, skip_tune=True, ray_address="inline")
    result = fit(chosen)
    assert result.notes == (
        "The NLL of MAP and of Laplace is that under an observation noise that nobody has tuned, 1.",
    )
    x, y = tuning_cases.points("test").tensors
    truth = -torch.distributions.Normal(tuning_cases.line()(x), 1.0).log_prob(y).mean()
    assert result.metrics["map"]["nll"] == pytest.approx(truth.item())


def test_sampled_networks_are_evaluated_under_a_noise_that_was_tuned(tmp_path):
    chosen = config(tmp_path, "line", pred_type="nn")
    tuned(chosen)
    assert 0.2 < posterior(chosen, tuning_cases.line()).sigma_noise.item() < 0.5


def test_noises_of_every_output_are_tuned_by_their_common_factor(tmp_path):
    chosen = config(tmp_path, "line", likelihood="tuning_cases:two_noises", skip_evaluate=False, ray_address="inline")
    result = fit(chosen)
    la = posterior(chosen, tuning_cases.line())
    x, y = tuning_cases.points("test").tensors
    mean, covariance = la(x)
    deviation = (covariance.diagonal(dim1=1, dim2=2) + (la.sigma_noise * torch.tensor([0.3, 1.2])) ** 2).sqrt()
    truth = -torch.distributions.Normal(mean, deviation).log_prob(y).mean()
    assert result.metrics["laplace"]["nll"] == pytest.approx(truth.item())
    assert la.sigma_noise.item() != 1 and result.helps


# ------------------------------------------------------------------ far outside, limits, and MAP


@pytest.mark.parametrize("power", [-5, 0, 5])
def test_a_prior_far_outside_the_range_at_the_start_is_found(tmp_path, power):
    """With inputs s times larger and weights s times smaller the best prior precision is s squared times larger."""
    found = []
    for size in (1.0, 10.0**power):
        arguments = {"model_args": {"size": size, "times": 3.0}, "data_args": {"size": size}}
        chosen = config(tmp_path / f"{size}", "classes", **arguments)
        _, manifest, _ = tuned(chosen)
        assert manifest["search"]["limit"] is None and manifest["search"]["helps"]
        found.append(posterior(chosen, tuning_cases.classifier(size, 3.0)).prior_precision.item())
    assert 0.01 < found[0] < 100
    assert found[1] / found[0] == pytest.approx(10.0 ** (2 * power), rel=1e-6)


def test_the_chosen_prior_is_the_best_of_a_scan(tmp_path):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0})
    tuned(chosen)
    la, (x, y) = posterior(chosen, tuning_cases.classifier(times=3.0)), tuning_cases.classes("val").tensors
    prior, losses = la.prior_precision.item(), []
    for power in (-1, 0, 1):
        la.prior_precision = prior * STEP**power
        losses.append(float(log_losses(la, x, y).mean()))
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_where_no_prior_helps_the_limit_is_kept_and_named(tmp_path):
    chosen = config(tmp_path, "calibrated", skip_evaluate=False, ray_address="inline")
    result = fit(chosen)
    search = tunings.read_tuning(Checkpoint(str(tmp_path)), result.tuning)[0]["search"]
    assert (search["limit"], search["helps"]) == ("MAP", False)
    la, (x, y) = posterior(chosen, tuning_cases.classifier()), tuning_cases.calibrated("val").tensors
    of_map = cross_entropy(tuning_cases.classifier()(x).detach(), y)
    assert float(log_losses(la, x, y).mean()) == pytest.approx(float(of_map), abs=1e-4)
    losses = []
    for prior in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0):  # and that is right
        la.prior_precision = prior
        losses.append(float(log_losses(la, x, y).mean() - of_map))
    assert losses == sorted(losses, reverse=True) and losses[0] > 1e-4 and losses[-1] > -1e-9, losses
    assert not result.helps
    said, out = " ".join(result.notes), io.StringIO()
    show_result(result, "", out)
    assert "Laplace, kept at MAP" in out.getvalue() and result.notes[-1] in out.getvalue()
    assert "no prior precision makes this posterior better than MAP" in said
    assert "To try: --subset-of-weights last_layer; --hessian-structure kron or diag; --recalibrate both" in said


@pytest.mark.parametrize(
    ("kind", "changes", "rounds"),
    [
        ("classes", {"model_args": {"times": 0.0}}, 1),  # zero logits stay so under any variance, by the probit link
        ("classes", {"model_args": {"times": 0.0}, "recalibrate": "both"}, None),
        ("classes", {"model": "tuning_cases:constant", "link_approx": "mc"}, 2),
        ("line", {"model_args": {"outputs": 2}, "model": "tuning_cases:constant"}, 1),  # its noise is open
    ],
)
def test_a_loss_that_does_not_depend_on_the_prior_is_said_to_be_so_at_once(tmp_path, kind, changes, rounds):
    _, manifest, said = tuned(config(tmp_path, kind, **changes))
    assert "The loss does not depend on the prior" in said and "so large" not in said
    search = manifest["search"]
    assert (search["limit"], search["helps"]) == ("MAP", False)
    assert rounds in (None, len(search["rounds"]))


def compared_with_map(la, model, x, y):
    scores = log_probability_scores(la(x, log_probs=True), y), log_probability_scores(model(x).log_softmax(-1), y)
    return paired_differences(*scores)


def test_a_prior_that_helps_one_figure_and_harms_the_other_is_passed_over(tmp_path):
    chosen = config(tmp_path, "outliers")
    _, manifest, said = tuned(chosen)
    model, (x, y) = tuning_cases.slope(), tuning_cases.outliers("val").tensors
    la = posterior(chosen, model)
    found = compared_with_map(la, model, x, y)
    assert found["nll"].low <= 1e-4 and found["ece"].low <= 1e-4
    assert manifest["search"]["limit"] == "MAP" or found["nll"].value < -1e-4
    rounds = [scored for scored in manifest["search"]["rounds"] if not scored["coarse"]]
    best = min(
        (loss, prior) for scored in rounds for prior, loss in zip(scored["priors"], scored["losses"], strict=True)
    )
    la.prior_precision = best[1]
    harmed = compared_with_map(la, model, x, y)
    assert harmed["nll"].high < 0 and harmed["ece"].low > 1e-4, "else this tests nothing"
    assert best[0] < rounds[0]["map"]
    assert "worse than MAP" in said


def test_where_every_prior_is_worse_in_a_figure_the_limit_is_looked_for(tmp_path, monkeypatch):
    """The bootstrap is asked for something that no value of the search meets."""
    monkeypatch.setattr("laplace_dist.stages.tune.not_worse", lambda found, tolerance: False)
    chosen = config(tmp_path, "outliers")
    _, manifest, said = tuned(chosen)
    assert (manifest["search"]["limit"], manifest["search"]["helps"]) == ("MAP", False)
    model, (x, y) = tuning_cases.slope(), tuning_cases.outliers("val").tensors
    found = compared_with_map(posterior(chosen, model), model, x, y)
    assert abs(found["nll"].value) <= 1e-6 and abs(found["ece"].value) < 1e-4
    assert "Kept is the limit in which the predictive is MAP's" in said and "ECE by" in said


def test_the_bridge_has_no_limit_that_is_map(tmp_path):
    chosen = config(tmp_path, "calibrated", link_approx="bridge")
    _, manifest, said = tuned(chosen)
    assert manifest["search"]["limit"] != "MAP"


@pytest.mark.parametrize(("bounds", "edge"), [([1e-3, 1e-2], 1e-2), ([1e3, 1e4], 1e3)])
def test_a_range_that_is_given_is_not_left(tmp_path, bounds, edge):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0}, prior_range=bounds)
    _, manifest, said = tuned(chosen)
    priors = [prior for scored in manifest["search"]["rounds"] for prior in scored["priors"]]
    found = posterior(chosen, tuning_cases.classifier(times=3.0)).prior_precision.item()
    assert bounds[0] * (1 - 1e-9) <= min(priors) and max(priors) <= bounds[1] * (1 + 1e-9)
    assert manifest["search"]["limit"] == "edge" and found == pytest.approx(edge)
    assert f"lies at an end of --prior-range {bounds[0]:g} {bounds[1]:g}" in said


def test_a_range_in_which_all_is_worse_than_map_is_left_and_that_is_said(tmp_path):
    chosen = config(tmp_path, "classes", model_args={"times": 3.0}, prior_range=[1e-9, 1e-7])
    _, manifest, said = tuned(chosen)
    la, model = posterior(chosen, tuning_cases.classifier(times=3.0)), tuning_cases.classifier(times=3.0)
    assert la.prior_precision.item() > 1e-6
    assert "It lies outside --prior-range 1e-09 1e-07, where all are worse" in said
    x, y = tuning_cases.classes("val").tensors
    found = compared_with_map(la, model, x, y)
    assert found["nll"].value < 0 and found["ece"].low <= 1e-4
    assert manifest["search"]["compared"]["nll"]["value"] == pytest.approx(found["nll"].value)
    la.prior_precision = 1e-7
    worse = compared_with_map(la, model, x, y)
    assert max(difference.low for difference in worse.values()) > 1e-4


def test_losses_that_are_not_finite_end_the_run_with_a_reason(tmp_path, monkeypatch):
    chosen = config(tmp_path, "classes")
    broken = lambda self, prediction, y, noise=1.0: math.nan  # noqa: E731
    monkeypatch.setattr("laplace.likelihoods.categorical.Categorical.tuning_loss", broken)
    with pytest.raises(RunFailed, match="No value that was tried has a finite score"):
        tuned(chosen)
