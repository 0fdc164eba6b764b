"""The shipped conformance suite, inherited for both backends and for backends as users write them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace.curvature import backend_class
from laplace.curvature.conformance import SumsConformance
from laplace.curvature.curvature import CurvatureInterface, GGNInterface
from laplace.structures.sums import CurvatureSums
from laplace.utils.matrix import Kron

from . import naive


def suite(backend, kwargs, likelihood, structure, subset="all"):
    """A test class."""
    attributes = {
        "backend": backend,
        "backend_kwargs": kwargs,
        "likelihood": likelihood,
        "hessian_structure": structure,
        "subset_of_weights": subset,
    }
    return type("Suite", (SumsConformance,), attributes)


def _suites():
    for structure in ("full", "kron", "diag"):
        for likelihood in ("classification", "regression"):
            for backend, estimators in (("native", ("ggn", "mc", "ef")), ("curvlinops", ("ggn", "ef"))):
                for estimator in estimators:
                    cls, kwargs = backend_class(backend, estimator)
                    kwargs = {**kwargs, "seed": 5, "num_samples": 2} if estimator == "mc" else kwargs
                    subset = "last_layer" if likelihood == "regression" and estimator != "ef" else "all"
                    name = f"Test{backend.title()}{estimator.title()}{structure.title()}{likelihood.title()}"
                    yield name, suite(cls, kwargs, likelihood, structure, subset)


for _name, _suite in _suites():
    globals()[_name] = _suite


class LoopGGN(GGNInterface):
    """A user's backend with Kronecker factors of its own, here by the slow reference; full and diag are inherited."""

    def kron(self, x, y, N, **kwargs):
        factors = naive.kron(self.model, x, y, self.likelihood.value, "ggn")
        scaled = [[fs[0]] if len(fs) == 1 else [fs[0], fs[1] * len(y) / N] for fs in factors]
        return naive.loss(self.model, x, y, self.likelihood.value), Kron(scaled)


class OnlyDiagonal(CurvatureInterface):
    """A user's backend that knows one structure."""

    def diag(self, x, y, **kwargs):
        likelihood = self.likelihood.value
        return naive.loss(self.model, x, y, likelihood), naive.full(self.model, x, y, likelihood, "ggn").diagonal()


class TestUserKron(suite(LoopGGN, {}, "classification", "kron")):
    """Factors divided by N inside the backend are undone by the sums."""


class TestUserFull(suite(LoopGGN, {}, "regression", "full")):
    """Inherited dense curvature."""


class TestUserMonteCarlo(suite(LoopGGN, {"stochastic": True, "seed": 0}, "classification", "diag")):
    """Inherited estimator: the noise belongs to the example."""


class TestUserDiagonal(suite(OnlyDiagonal, {}, "classification", "diag")):
    """One structure suffices."""


class TestConvolution(suite(None, {}, "classification", "kron")):
    """Weight sharing, and a layer of a kind that falls back."""

    def make_model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()

    def make_data(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(7, 1, 3, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (7,), generator=generator)


def test_what_a_backend_lacks_is_refused_by_name():
    class Suite(SumsConformance):
        backend = OnlyDiagonal

    la = Suite().make_laplace()
    with pytest.raises(NotImplementedError, match="OnlyDiagonal has no Kronecker-factored curvature"):
        Suite().sums_of(la, 0, 3)


@pytest.mark.parametrize("broken", ["forgets-batches", "keeps-a-mean", "noise-by-batch"])
def test_the_suite_notices_broken_backends(broken):
    """The suite is able to fail: each of these backends breaks one law."""

    class Broken(GGNInterface):
        def diag(self, x, y, **kwargs):
            loss, h = super().diag(x, y)
            scale = {"keeps-a-mean": 1 / len(y), "noise-by-batch": 1 + 0.01 * (len(y) % 2)}.get(broken, 1)
            return loss, h * scale

        def accumulate(self, sums, x, y, offset=0):
            if broken == "forgets-batches":
                for value in sums.tensors.values():
                    value.zero_()
            super().accumulate(sums, x, y, offset)

    tests = suite(Broken, {}, "classification", "diag")()
    with pytest.raises(AssertionError, match="relative difference"):
        tests.test_batch_size_does_not_matter()


def test_sums_of_different_models_do_not_add():
    one = suite(None, {}, "classification", "kron")().make_laplace().zero_sums()
    two = suite(None, {}, "classification", "kron", "last_layer")().make_laplace().zero_sums()
    with pytest.raises(ValueError, match="cannot be added.*parameter '0.bias' differs"):
        one.merge(two)
    with pytest.raises(ValueError, match="structure 'kron' against 'diag'"):
        one.merge(suite(None, {}, "classification", "diag")().make_laplace().zero_sums())


def test_tensors_that_do_not_fit_are_refused():
    sums = suite(None, {}, "classification", "kron")().make_laplace().zero_sums()
    tensors = sums.to_tensors()
    with pytest.raises(ValueError, match=r"missing \['0.weight/A'\]"):
        CurvatureSums.from_tensors(sums.spec, {k: v for k, v in tensors.items() if k != "0.weight/A"}, 1)
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        CurvatureSums.from_tensors(sums.spec, {**tensors, "extra": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match=r"'0.weight/A' has shape \(2, 2\), expected \(3, 3\)"):
        CurvatureSums.from_tensors(sums.spec, {**tensors, "0.weight/A": torch.zeros(2, 2)}, 1)
