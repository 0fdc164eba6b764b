"""Options of backends' methods are honoured or refused."""

from __future__ import annotations

import pytest
import torch

from laplace import Laplace
from laplace.curvature import NativeEF, NativeGGN, NativeHessian, backend_class
from laplace.curvature.curvature import GGNInterface

from . import naive
from .models import CASES, loader

SHARED = ["sequence", "stride-padding", "two-convolutions", "twice"]


def reduced_factors(model, x, y, likelihood):
    """KFAC-reduce by its definition: means of inputs, sums of gradients, one outer product of each per example."""
    factors = []
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        left, right = 0.0, 0.0
        for one, target in zip(x, y, strict=True):
            a, g, _, f = naive.layer_records(model, [module], one, target, likelihood)
            mean, total = a.mean(0), g.sum(1)
            right = right + torch.outer(mean, mean) / len(x)
            left = left + total.T @ naive.output_hessian(f, likelihood) @ total
        factors.append([left, right] if p.ndim > 1 else [left])
    return factors


def agree(kron, factors):
    for found, truth in zip(kron.kfacs, factors, strict=True):
        for f, t in zip(found, truth, strict=True):
            assert naive.relative_error(f, t) < 1e-9


@pytest.mark.parametrize("case", SHARED)
def test_kfac_reduce_is_its_definition(case):
    model, x, y = CASES[case].make()
    truth = reduced_factors(model, x, y, "classification")
    backend = NativeGGN(model, "classification")
    agree(backend.kron(x, y, N=len(x), kfac_approx="reduce")[1], truth)
    agree(backend.kron(x, y, N=len(x))[1], naive.kron(model, x, y, "classification", "ggn"))
    agree(NativeGGN(model, "classification", kfac_approx="reduce").kron(x, y, len(x))[1], truth)


@pytest.mark.parametrize("case", ["sequence", "two-convolutions"])
def test_curvlinops_reduces_alike(case):
    model, x, y = CASES[case].make()
    backend = backend_class("curvlinops")[0](model, "classification")
    agree(backend.kron(x, y, N=len(x), kfac_approx="reduce")[1], reduced_factors(model, x, y, "classification"))


def test_a_posterior_is_fitted_with_kfac_reduce():
    model, x, y = CASES["sequence"].make()
    la = Laplace(model, "classification", "all", "kron", backend_kwargs={"kfac_approx": "reduce"})
    la.fit(loader(x, y))
    agree(la.H_facs, reduced_factors(model, x, y, "classification"))
    plain = Laplace(model, "classification", "all", "kron")
    plain.load_state_dict(la.state_dict())
    with pytest.raises(ValueError, match="estimated by 'ggn with KFAC-reduce' and by 'ggn' cannot be added"):
        plain.fit(loader(x, y), override=False)


@pytest.mark.parametrize("method", ["kron", "diag", "full"])
def test_the_number_of_draws_is_honoured(method):
    model, x, y = CASES["mlp"].make()
    many = NativeGGN(model, "classification", stochastic=True, num_samples=7, seed=3)
    one = NativeGGN(model, "classification", stochastic=True, seed=3)

    def matrix(backend, **options):
        found = getattr(backend, method)(x, y, N=len(x), **options)[1]
        return found.to_matrix() if method == "kron" else found

    assert torch.equal(matrix(one, mc_samples=7), matrix(many))
    assert not torch.equal(matrix(one), matrix(many))
    assert one.num_samples == 1
    with pytest.raises(ValueError, match="mc_samples=0 must be an integer of at least 1"):
        matrix(one, mc_samples=0)


@pytest.mark.parametrize("method", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["native", "curvlinops", "asdl", "backpack"])
def test_other_options_are_refused(name, method):
    model, x, y = CASES["mlp"].make()
    backend = backend_class(name)[0](model, "classification")
    with pytest.raises(
        ValueError, match=rf"{type(backend).__name__}.{method}\(\) takes no option 'nonsense'; valid are 'N'"
    ):
        getattr(backend, method)(x, y, N=len(x), nonsense=3)
    with pytest.raises(ValueError, match=r"draws no labels, so mc_samples=7 means nothing"):
        getattr(backend, method)(x, y, N=len(x), mc_samples=7)
    getattr(backend, method)(x, y, N=len(x))


def test_options_that_a_backend_lacks_are_refused():
    model, x, y = CASES["mlp"].make()
    for backend, method in ((NativeHessian, "full"), (NativeEF, "diag"), (GGNInterface, "full")):
        with pytest.raises(ValueError, match="takes no option 'kfac_approx'"):
            getattr(backend(model, "classification"), method)(x, y, kfac_approx="reduce")
    for value in ("shrink", None):
        with pytest.raises(ValueError, match="kfac_approx=.* is unknown; valid values are 'expand' and 'reduce'"):
            NativeGGN(model, "classification").kron(x, y, N=5, kfac_approx=value)
        with pytest.raises(ValueError, match="kfac_approx=.* is unknown"):
            NativeGGN(model, "classification", kfac_approx=value)
