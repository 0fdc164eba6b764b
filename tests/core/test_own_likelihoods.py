"""Likelihoods of one's own, and the laws that these and the library's keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from laplace import FullLaplace, Laplace
from laplace.likelihoods import (
    BaseLikelihood,
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
    WeightedCategorical,
)
from laplace.likelihoods.conformance import LikelihoodConformance

from . import naive

N, OUTPUTS = 9, 4


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)).double()


class Exponential(BaseLikelihood):
    """Waiting times whose log rate is the output."""

    def check_shapes(self, f, y, offset=0):
        super().check_shapes(f, y, offset)
        if y.shape != f.shape or bool((y < 0).any()):
            raise ValueError("Waiting times are positive, one per output.")

    def nll(self, f, y):
        return (y * f.exp() - f).sum(-1)

    def mean(self, f):
        return (-f).exp()

    def root_columns(self, f, y):
        one = torch.ones_like(f[..., :1])
        return (torch.nn.functional.pad(one, (j, f.shape[-1] - 1 - j)) for j in range(f.shape[-1]))

    def draw(self, f, u):
        return -torch.log1p(-u) * (-f).exp()


class Logistic(BaseLikelihood):
    """Nothing but the one method."""

    def nll(self, f, y):
        return torch.nn.functional.softplus(-y * f).sum(-1)


def test_one_method_is_enough():
    torch.manual_seed(0)
    x, y = torch.randn(N, 3).double(), torch.randint(2, (N, OUTPUTS)).double()
    mine, theirs = Laplace(model(), Logistic(), "all", "full"), Laplace(model(), Bernoulli(), "all", "full")
    mine.fit([(x, 2 * y - 1)])
    theirs.fit([(x, y)])
    assert naive.relative_error(mine.H, theirs.H) < 1e-9
    assert float(mine.log_marginal_likelihood()) == pytest.approx(float(theirs.log_marginal_likelihood()))
    mine.optimize_prior_precision(method="gridsearch", val_loader=[(x, 2 * y - 1)], grid_size=3)
    assert mine(x).shape == (N, OUTPUTS)
    with pytest.raises(NotImplementedError, match="has no draw"):
        Laplace(model(), Logistic(), "all", "full", backend_kwargs={"stochastic": True}).fit([(x, 2 * y - 1)])


def test_a_likelihood_that_is_not_log_concave_says_so():
    class Cauchy(BaseLikelihood):
        def nll(self, f, y):
            return torch.log1p((y - f) ** 2).sum(-1)

    with pytest.raises(ValueError, match="not log-concave"):
        Laplace(model(), Cauchy(), "all", "full").fit(
            [(torch.randn(N, 3).double(), 9 + torch.randn(N, OUTPUTS).double())]
        )


def test_the_example_of_the_readme():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    code = text.split("### Likelihoods, and your own")[1].split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    x = torch.randn(N, 3).double()
    y = Exponential().draw(model()(x).detach(), torch.rand(N, OUTPUTS).double())
    names = {"model": model(), "train_loader": [(x, y)], "x": x, "__name__": "readme"}
    exec(code, names)
    twin = Laplace(model(), Exponential(), "all", "kron")
    twin.fit([(x, y)])
    assert len(code.split("class Exponential")[1].split("\n\n\n")[0].splitlines()) <= 20
    assert names["waiting_time"].shape == (N, OUTPUTS)
    assert float(names["la"].loss) == pytest.approx(float(twin.loss))
    assert naive.relative_error(names["la"].log_det_ratio, twin.log_det_ratio) > 0  # the prior was tuned
    y_root = list(names["Exponential"]().hessian_root(model()(x).detach(), y))
    truth = torch.diag_embed(y * model()(x).detach().exp())
    assert naive.relative_error(sum(v[:, :, None] * v[:, None] for v in y_root), truth) < 1e-9


def test_own_likelihood_is_a_subclass_away():
    assert isinstance(FullLaplace(model(), Exponential()).likelihood, Exponential)


class TestBernoulli(LikelihoodConformance):
    def make_likelihood(self):
        return Bernoulli()


class TestPoisson(LikelihoodConformance):
    def make_likelihood(self):
        return Poisson()


class TestHeteroscedastic(LikelihoodConformance):
    positive_hessian = False

    def make_likelihood(self):
        return HeteroscedasticGaussian()


class TestGaussian(LikelihoodConformance):
    def make_likelihood(self):
        return Gaussian()


class TestCategorical(LikelihoodConformance):
    def make_likelihood(self):
        return Categorical()


class TestWeighted(LikelihoodConformance):
    def make_likelihood(self):
        return WeightedCategorical(class_weights=[0.5, 2.0], label_smoothing=0.1)


class TestSoft(LikelihoodConformance):
    def make_likelihood(self):
        return WeightedCategorical(soft_targets=True, label_smoothing=0.1)


class TestExponential(LikelihoodConformance):
    positive_hessian = False  # it takes its Fisher information, which is one

    def make_likelihood(self):
        return Exponential()


class TestLogistic(LikelihoodConformance):
    has_draws = False

    def make_likelihood(self):
        return Logistic()

    def make_targets(self):
        return torch.tensor([[1.0, -1.0]] * 5, dtype=torch.float64)
