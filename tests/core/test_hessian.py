"""Hessians of three backends against differentiation twice, one row at a time, and eigenpairs from products alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import laplace.curvature
from laplace import Laplace
from laplace.backends.hessian import NativeHessian
from laplace.curvature.curvlinops import CurvlinopsHessian
from laplace.errors import NonFiniteError
from laplace.linalg.lowrank import block_lanczos

from . import naive
from .models import CASES, Case, loader

TOLERANCE = 1e-9
BACKENDS = ("NativeHessian", "AsdlHessian", "CurvlinopsHessian")
NAMES = ("mlp", "regression", "frozen", "stride-padding", "twice", "tied", "used-outside", "embedding", "normed")


def backend_of(name):
    return getattr(laplace.curvature, name)


def naive_hessian(model, xs, ys, likelihood):
    """Each row by reverse mode over reverse mode."""
    params = [p for p in model.parameters() if p.requires_grad]
    total = sum(naive.example_loss(model(x[None])[0], y, likelihood) for x, y in zip(xs, ys, strict=True))
    grads = torch.autograd.grad(total, params, create_graph=True)
    rows = []
    for entry in torch.cat([g.flatten() for g in grads]):
        row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if r is None else r).flatten() for r, p in zip(row, params, strict=True)])
        )
    return torch.stack(rows)


def check_eigenpairs(vectors, values, matrix, rank):
    truth = torch.linalg.eigvalsh(matrix).flip(0)[:rank]
    truth = truth[truth > 1e-9 * truth.max()]
    assert values.shape == truth.shape
    torch.testing.assert_close(values, truth, rtol=1e-9, atol=1e-10)
    assert float((matrix @ vectors - vectors * values).norm()) < 1e-7 * float(truth.max())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values)).to(vectors), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_full_and_eigenpairs_equal_naive(name, backend):
    case = CASES[name]
    model, x, y = case.make(n=7)
    cls = backend_of(backend)
    if (backend, name) == ("CurvlinopsHessian", "normed"):
        with pytest.raises(ValueError, match="LayerNorm is such a layer. Use NativeHessian"):
            cls(model, case.likelihood).full(x, y)
        return
    expected = naive_hessian(model, x, y, case.likelihood)
    loss, h = cls(model, case.likelihood).full(x, y)
    assert naive.relative_error(h, expected) < TOLERANCE
    assert float(loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)), rel=1e-12)
    vectors, values, loss = cls(model, case.likelihood, low_rank=4).eig_lowrank(loader(x, y, 3))
    check_eigenpairs(vectors, values, expected, 4)
    assert float(loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dense_posterior_with_the_hessian(backend):
    model, x, y = CASES["regression"].make(n=7)
    la = Laplace(model, "regression", "all", "full", backend=backend_of(backend), prior_precision=50.0, sigma_noise=2.0)
    la.fit(loader(x, y))
    h = naive_hessian(model, x, y, "regression") / 4
    precision = h + 50 * torch.eye(len(h)).double()
    assert naive.relative_error(la.H, h * 4) < TOLERANCE
    torch.testing.assert_close(la.log_det_posterior_precision, torch.logdet(precision))
    expected = naive.glm_covariance(naive.jacobians(model, x), precision)
    torch.testing.assert_close(la(x)[1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prior", [1e-3, [1e-3] * 4])
def test_a_posterior_that_does_not_exist_is_refused(prior):
    """At random weights the Hessian is indefinite; clamping its eigenvalues would give an evidence all the same."""
    model, x, y = CASES["regression"].make(n=7)
    la = Laplace(model, "regression", "all", "full", backend=NativeHessian, prior_precision=torch.tensor(prior))
    la.fit(loader(x, y))
    assert float(torch.linalg.eigvalsh(la.H)[0]) < -0.1
    for quantity in (lambda: la.log_det_posterior_precision, lambda: la.posterior_scale, lambda: la(x)):
        with pytest.raises(ValueError, match="not positive definite.*hessian_structure='lowrank'"):
            quantity()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_other_structures_are_refused(structure, backend):
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", structure, backend=backend_of(backend))
    with pytest.raises(ValueError, match=f"{backend} has no '{structure}' structure; valid are 'full' and 'lowrank'"):
        la.fit(loader(x, y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_examples_are_named_by_global_index(backend):
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", "full", backend=backend_of(backend))
    x[3] = torch.nan
    with pytest.raises(NonFiniteError, match="indices 3"):
        la.fit(loader(x, y))
    x[3], y[4] = 0, 5
    with pytest.raises(ValueError, match="Label 5 of example 4"):
        la.fit(loader(x, y))
    with pytest.raises(ValueError, match="Label 5 of example 4"):
        backend_of(backend)(model, "classification").eig_lowrank(loader(x, y))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", ["last_layer", "subnetwork"])
def test_subsets(subset, backend):
    case = CASES["regression"]
    model, x, y = case.make(n=6)
    h = naive_hessian(model, x, y, "regression")
    indices = torch.tensor([1, 4, 20])
    if subset == "last_layer":
        la = Laplace(model, "regression", "last_layer", "full", backend=backend_of(backend))
        la.fit(loader(x, y))
        assert naive.relative_error(la.H, h[16:, 16:]) < TOLERANCE
    else:
        ours = backend_of(backend)(model, "regression", **{"last_layer": False})
        ours.subnetwork_indices = indices
        assert naive.relative_error(ours.full(x, y)[1], h[indices][:, indices]) < TOLERANCE
        with pytest.raises(ValueError, match="for a subnetwork use 'full' or 'diag'"):
            ours.eig_lowrank(loader(x, y))


class Attention(nn.Module):
    """Fused attention, whose fast kernels cannot be differentiated twice."""

    def __init__(self):
        super().__init__()
        self.qkv, self.last = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.last(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def test_attention_and_dict_batches():
    model, x, y = Case(Attention, (3, 4)).make()
    expected = naive_hessian(_math(model), x, y, "classification")
    assert naive.relative_error(NativeHessian(model, "classification").full(x, y)[1], expected) < TOLERANCE

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return self.inner(batch["input_ids"])

    backend = NativeHessian(Wrapped(), "classification", low_rank=3)
    batches = [{"input_ids": x[:3], "labels": y[:3]}, {"input_ids": x[3:], "labels": y[3:]}]
    vectors, values, _ = backend.eig_lowrank(batches)
    check_eigenpairs(vectors, values, expected, 3)


def _math(model):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            q, k, v = model.qkv(x).chunk(3, -1)
            weights = (q @ k.transpose(1, 2) / 2).softmax(-1)
            return model.last((weights @ v).mean(1))

    return Plain()


@pytest.mark.parametrize("name", ["mlp", "regression", "stride-padding", "sequence-output", "embedding"])
@pytest.mark.parametrize(
    "backend, kwargs",
    [
        ("NativeGGN", {}),
        ("NativeEF", {}),
        ("NativeGGN", {"stochastic": True, "seed": 3}),
        ("CurvlinopsGGN", {}),
        ("AsdlEF", {}),
    ],
)
def test_eigenpairs_of_ggn_and_fisher(backend, kwargs, name):
    case = CASES[name]
    model, x, y = case.make(n=7)
    reference = backend_of("NativeEF" if backend.endswith("EF") else "NativeGGN")
    _, matrix = reference(model, case.likelihood, **kwargs).full(x, y)
    vectors, values, loss = backend_of(backend)(model, case.likelihood, low_rank=5, **kwargs).eig_lowrank(
        loader(x, y, 3)
    )
    check_eigenpairs(vectors, values, matrix, 5)
    assert float(loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)))


def test_sampled_labels_are_the_same_in_every_pass_without_a_seed():
    model, x, y = CASES["mlp"].make(n=7)
    backend = backend_of("NativeGGN")(model, "classification", stochastic=True, low_rank=4)
    torch.manual_seed(5)
    vectors, values, _ = backend.eig_lowrank([(x[:3], y[:3]), (x[3:], y[3:])])
    assert backend.seed is None
    torch.manual_seed(5)
    seed = int(torch.randint(1 << 60, ()))
    _, matrix = backend_of("NativeGGN")(model, "classification", stochastic=True, seed=seed).full(x, y)
    check_eigenpairs(vectors, values, matrix, 4)
    with pytest.raises(ValueError, match="draws of a sampled Fisher.*shuffle=False"):
        backend.eig_lowrank(Reversing([(x[:3], y[:3]), (x[3:], y[3:])]))
    exact = backend_of("NativeGGN")(model, "classification", low_rank=4)
    _, values, _ = exact.eig_lowrank(Reversing([(x[:3], y[:3]), (x[3:], y[3:])]))
    torch.testing.assert_close(values, torch.linalg.eigvalsh(exact.full(x, y)[1]).flip(0)[:4])


class Reversing(list):
    """The same batches in another order at every pass."""

    def __iter__(self):
        self.reverse()
        return iter(list(super().__iter__()))


SPECTRA = {
    "indefinite": torch.linspace(-50, 40, 60),
    "decaying": 10.0 ** torch.linspace(3, -6, 60),
    "repeated": torch.cat([torch.full((7,), 5.0), torch.full((7,), 3.0), torch.zeros(46)]),
    "rank two": torch.cat([torch.tensor([3.0, 1.0]), torch.zeros(58)]),
    "clustered": 1 + 1e-3 * torch.linspace(0, 1, 60),
    "tiny": 1e-12 * torch.linspace(0, 1, 60),
}


@pytest.mark.parametrize("rank", [1, 5, 60, 100])
@pytest.mark.parametrize("name", SPECTRA)
def test_block_lanczos_finds_the_largest_eigenvalues(name, rank):
    spectrum = SPECTRA[name].double()
    q = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(1)).double())[0]
    matrix = (q * spectrum) @ q.T
    products = []

    def product(vectors):
        products.append(vectors.shape[1])
        return matrix @ vectors

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors, values = block_lanczos(product, 60, rank)
    truth = spectrum.sort(descending=True).values[:rank]
    truth = truth[truth > 1e-10 * spectrum.abs().max()]
    assert values.shape == truth.shape
    torch.testing.assert_close(values / truth.max(), truth / truth.max(), rtol=1e-9, atol=1e-12)
    assert float((matrix @ vectors - vectors * values).norm()) < 1e-8 * float(spectrum.abs().max())
    assert sum(products) <= 60 + 1e-9


def test_block_lanczos_says_when_it_has_not_converged():
    matrix = torch.linspace(1, 1.001, 4000).double()
    with pytest.warns(UserWarning, match="not converged after 60 passes.*Ask for fewer"):
        block_lanczos(lambda v: matrix[:, None] * v, 4000, 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        block_lanczos(lambda v: v, 3, 0)


@pytest.mark.parametrize(
    "batches, message",
    [
        (lambda x, y: iter([(x, y)]), "several times; give a DataLoader or list, not an iterator"),
        (lambda x, y: [], "empty"),
        (lambda x, y: Changing(x, y), "changes between passes: 5 examples .* without random augmentation"),
        (lambda x, y: Changing(x, y, shorter=True), "changes between passes: 5 examples .* then 4"),
    ],
)
def test_unusable_loaders_are_refused(batches, message):
    model, x, y = CASES["mlp"].make()
    with pytest.raises(ValueError, match=message):
        NativeHessian(model, "classification", low_rank=1).eig_lowrank(batches(x, y))


class Changing:
    """Other data at every pass."""

    def __init__(self, x, y, shorter=False):
        self.x, self.y, self.shorter, self.passes = x, y, shorter, 0

    def __iter__(self):
        self.passes += 1
        stop = len(self.x) - (self.passes > 1) if self.shorter else len(self.x)
        yield self.x[:stop] * (1 if self.shorter else self.passes), self.y[:stop]


def test_the_model_is_left_as_found():
    for backend in BACKENDS:
        model, x, y = CASES["mlp"].make()
        model.train()
        marks = [set(vars(m)) for m in model.modules()]
        backend_of(backend)(model, "classification", low_rank=2).eig_lowrank(loader(x, y))
        backend_of(backend)(model, "classification").full(x, y)
        assert [set(vars(m)) for m in model.modules()] == marks
        assert all(m.training for m in model.modules())
        assert all(p.grad is None and p.requires_grad and not p.__dict__ for p in model.parameters())


def test_forward_mode_is_checked_for_every_model():
    """Without the check, a wrong formula of torch would go into the posterior."""
    model, x, y = Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))).make()
    with pytest.raises(ValueError, match="Use NativeHessian"):
        CurvlinopsHessian(model, "classification").full(x, y)
