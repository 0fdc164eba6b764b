"""Parameters that need Jacobians of their own are treated a few examples at a time, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from laplace import Laplace, NotEnoughMemoryError
from laplace.backends import captured_model
from laplace.capture import capture, contractions
from laplace.curvature import NativeEF, NativeGGN
from laplace.linalg import memory

from .models import CASES, loader
from .test_memory import Largest

FALLBACKS = ["tied", "used-outside", "scalar", "inplace-residual-fallback"]


def everything(name, structure, backend=NativeGGN):
    """Fit, evidence, predictives and a grid search, as one vector."""
    case = CASES[name]
    model, x, y = case.make(n=7)
    kwargs = {"n_subset": 5} if structure == "gp" else {"backend": backend}
    la = Laplace(model, case.likelihood, "all", structure, prior_precision=2.0, **kwargs)
    la.fit(loader(x, y, 4))
    found = [la(x), la.log_marginal_likelihood(), la.functional_samples(x, n_samples=2, generator=seeded())]
    kind = "gp" if structure == "gp" else "glm"
    la.optimize_prior_precision(kind, "gridsearch", val_loader=loader(x, y, 7), grid_size=3, log_prior_prec_min=-1)
    found += [la(x), la.backend.jacobians(x)[0]]
    return torch.cat([value.flatten() for value in found])


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank", "gp"])
def test_one_example_at_a_time_gives_the_same(name, structure, monkeypatch):
    expected = everything(name, structure)
    monkeypatch.setattr(captured_model, "_HELD", 1)
    torch.testing.assert_close(everything(name, structure), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend, kwargs", [(NativeEF, {}), (NativeGGN, {"stochastic": True, "seed": 3})])
def test_draws_and_targets_stay_with_their_examples(backend, kwargs, monkeypatch):
    def factors():
        model, x, y = CASES["used-outside"].make(n=7)
        la = Laplace(model, "classification", "all", "kron", backend=backend, backend_kwargs=kwargs)
        la.fit(loader(x, y, 4))
        return torch.cat([value.flatten() for value in la.sums.to_tensors().values()])

    expected = factors()
    monkeypatch.setattr(captured_model, "_HELD", 1)
    torch.testing.assert_close(factors(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", ["kron", "diag", "ekfac", "blockdiag"])
def test_their_jacobians_stay_small(structure, monkeypatch):
    """The weight used twice has 12 entries: its Jacobians over 200 examples and 3 outputs would have 7,200."""
    monkeypatch.setattr(captured_model, "_HELD", 300)
    model, x, y = CASES["used-outside"].make(n=200)
    la = Laplace(model, "classification", "all", structure)
    with Largest() as largest:
        la.fit(loader(x, y, 200))
        la(x)
    assert largest.shape.numel() <= 200 * 3 * 4, largest.shape


def test_a_jacobian_of_one_example_that_cannot_fit_is_refused_by_name(monkeypatch):
    model, x, y = CASES["used-outside"].make()
    la = Laplace(model, "classification", "all", "diag")
    la.initialize(x)
    sums = la.zero_sums()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with pytest.raises(
        NotEnoughMemoryError, match=r"1 examples x 1 outputs x 12 parameters \(one.weight\) needs 192 bytes"
    ):
        la.accumulate(sums, x, y)
    assert sums.n_data == 0


class OneConvolution(torch.nn.Sequential):
    """Few weights, many pixels, and 20 outputs."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(1))
        self.append(torch.nn.Flatten())
        self.append(torch.nn.Linear(4, 20))


@pytest.mark.parametrize("structure", ["kron", "diag", "ekfac", "blockdiag"])
def test_memory_of_predictions_and_diagonal_fits_does_not_grow_with_the_batch(structure, monkeypatch):
    """Of 20 outputs, gradients of all pixels; of a convolution, patches: neither of more than a few examples at once."""
    monkeypatch.setattr(captured_model, "_HELD", 20000)
    monkeypatch.setattr(contractions, "_CHUNK", 20000)
    monkeypatch.setattr(capture, "_KEPT", 1000)
    model, sizes = OneConvolution().double(), []
    la = Laplace(model, "classification", "all", structure, prior_precision=2.0)
    x, y = torch.randn(64, 2, 8, 8).double(), torch.randint(20, (64,))
    la.fit([(x[:4], y[:4])])
    for n in (16, 64):
        with Largest() as largest:
            if structure == "diag":
                la.fit([(x[:n], y[:n])])
            la(x[:n])
        sizes.append(largest.shape.numel())
    rest = 64 * 4 * 64  # what the model itself makes of 64 images
    assert sizes[0] <= 20000 and sizes[1] <= max(20000, rest, 64 * 20 * 20)
    expected = torch.cat([la(x[i : i + 1]) for i in range(64)])
    torch.testing.assert_close(la(x), expected, rtol=1e-9, atol=1e-12)


def test_targets_of_another_number_are_refused(monkeypatch):
    monkeypatch.setattr(captured_model, "_HELD", 1)
    model, x, y = CASES["used-outside"].make(n=5)
    la = Laplace(model, "classification", "all", "diag")
    for targets in (y[:4], y.repeat(2)):
        with pytest.raises(ValueError, match=f"{len(targets)} targets, but 5 inputs"):
            la.fit([(x, targets)])


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_memory_of_a_search_does_not_grow_with_the_batch(structure, monkeypatch):
    """Of an image, gradients of 20 outputs at all pixels, of 64 numbers in each of 4 channels, and of the last layer are held."""
    model = OneConvolution().double()
    la = Laplace(model, "classification", "all", structure)
    x, y = torch.randn(64, 2, 8, 8).double(), torch.randint(20, (64,))
    la.fit([(x[:4], y[:4])])
    lengths, found, real = [], [], la.backend.capture
    monkeypatch.setattr(la.backend, "capture", lambda inputs: lengths.append(len(inputs)) or real(inputs))
    for held in (20 * (64 * 4 + 20) * 5, 1 << 27):
        monkeypatch.setattr(captured_model, "_HELD", held)
        la.optimize_prior_precision("glm", "gridsearch", val_loader=[(x, y)], grid_size=3)
        found.append(la.prior_precision.clone())
    assert torch.equal(*found)
    assert lengths == [5] * 12 + [4, 64]
