"""Jobs with likelihoods by import path: the numbers of the library alone, and another likelihood is another run."""

from __future__ import annotations

import math

import dist_cases
import likelihood_cases
import pytest
import torch

from laplace import Laplace
from laplace.likelihoods import Bernoulli, Poisson
from laplace_dist import cli, fit, load_posterior
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.errors import SettingsError

CASES = {
    "likelihood_cases:Exponential": ("waiting_times", likelihood_cases.Exponential, {"nll"}),
    "laplace.likelihoods:Poisson": ("counts", Poisson, {"nll", "rmse"}),
    "laplace.likelihoods:Bernoulli": ("binary", Bernoulli, {"accuracy", "nll", "brier", "ece", "ood_auroc/other"}),
    "likelihood_cases:ignoring": (
        "partly_labelled",
        likelihood_cases.ignoring,
        {"accuracy", "nll", "brier", "ece", "ood_auroc/other"},
    ),
}


def config(folder, path, **changes):
    settings = {
        "model_args": {"dtype": "float64"},
        "data": f"likelihood_cases:{CASES[path][0]}",
        "likelihood": path,
        "grid_size": 5,
        "ood": ["other"],
        "skip_tune": False,
        "skip_evaluate": False,
    }
    return dist_cases.config(folder, **{**settings, **changes})


@pytest.mark.parametrize("path", CASES)
def test_a_whole_run_against_the_library_alone(tmp_path, path):
    name, make, expected = CASES[path]
    _, metrics = dist_cases.run_inline(config(tmp_path, path))
    ours = load_posterior(str(tmp_path), dist_cases.convnet("float64"))
    alone = Laplace(dist_cases.convnet("float64"), make(), "all", "kron", prior_precision=ours.prior_precision)
    x, y = getattr(likelihood_cases, name)("train").tensors
    alone.fit([(x[start : start + 4], y[start : start + 4]) for start in range(0, len(x), 4)])
    assert ours.likelihood_object.identity == make().identity
    assert float(ours.log_marginal_likelihood()) == pytest.approx(float(alone.log_marginal_likelihood()), rel=1e-10)
    assert set(metrics["map"]) == set(metrics["laplace"]) == expected
    assert all(math.isfinite(value) for values in metrics.values() for value in values.values())


def test_map_scores_are_those_of_the_network(tmp_path):
    path = "laplace.likelihoods:Poisson"
    _, metrics = dist_cases.run_inline(config(tmp_path, path))
    x, y = likelihood_cases.counts("test").tensors
    rates = dist_cases.convnet("float64")(x).detach().exp()
    truth = -torch.distributions.Poisson(rates).log_prob(y).mean()
    assert metrics["map"]["nll"] == pytest.approx(float(truth), rel=1e-9)


def test_workers_of_a_cluster_make_it_from_its_path(tmp_path, cluster):
    path = "likelihood_cases:Exponential"
    fit(config(tmp_path / "ray", path, ray_address=cluster, num_workers=2))
    dist_cases.run_inline(config(tmp_path / "inline", path))
    one, two = (load_posterior(str(tmp_path / name), dist_cases.convnet("float64")) for name in ("ray", "inline"))
    assert float(one.log_marginal_likelihood()) == float(two.log_marginal_likelihood())


def test_another_likelihood_does_not_resume_the_run(tmp_path, capsys):
    path = "laplace.likelihoods:Poisson"
    dist_cases.run_inline(config(tmp_path, path, skip_tune=True, skip_evaluate=True))
    with pytest.raises(SettingsError, match="likelihood"):
        dist_cases.run_inline(config(tmp_path, path, likelihood="likelihood_cases:Exponential"))
    flags = ["--model=dist_cases:convnet", "--model-args={dtype: float64}", "--data=likelihood_cases:counts"]
    assert cli.main("evaluate", [*flags, f"--checkpoint={tmp_path}"]) == 2
    assert "was fitted with 'laplace.likelihoods:Poisson'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("likelihood_cases:nothing", "--likelihood: .* has no 'nothing'"),
        ("no_such_module:Law", "--likelihood: .* no module 'no_such_module'"),
        ("likelihood_cases:with_argument", "cannot be called without arguments .*missing a required argument: 'index'"),
        ("likelihood_cases:no_likelihood", "returned a str; expected a subclass of laplace.likelihoods.BaseLikelihood"),
    ],
)
def test_a_path_to_something_else_is_refused(tmp_path, path, message):
    with pytest.raises(SettingsError, match=message):
        likelihood_of(path)
    with pytest.raises(SettingsError, match=message):
        dist_cases.run_inline(dist_cases.config(tmp_path, likelihood=path))


def test_data_that_does_not_fit_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(SettingsError, match="--data: Waiting times are not negative"):
        dist_cases.run_inline(dist_cases.config(tmp_path, likelihood="likelihood_cases:Exponential"))


def test_sampled_networks_of_a_regression_need_no_other_link(tmp_path):
    settings = {
        "data": "dist_cases:regression_data",
        "likelihood": "regression",
        "pred_type": "nn",
        "skip_evaluate": False,
    }
    assert dist_cases.run_inline(dist_cases.config(tmp_path, **settings))[1]["laplace"]["rmse"] > 0
