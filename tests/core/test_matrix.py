"""Kronecker algebra against dense matrices."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laplace import Laplace
from laplace.linalg.eigen import eigenvalues, eigh, symeig
from laplace.linalg.kronecker import rounded_factor
from laplace.utils.matrix import Kron, KronDecomposed

from . import naive
from .models import CASES, loader

few = settings(max_examples=25, deadline=None)
blocks = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["weight", "left", "right", "both"]), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.just("bias"), st.integers(1, 3), st.just(1)),
        st.tuples(st.just("diagonal"), st.integers(1, 3), st.just(1)),
    ),
    min_size=1,
    max_size=4,
)
seeds = st.integers(0, 1000)
exponents = st.sampled_from([1, -1, -0.5, 0.5, 2])


def positive(size, generator):
    root = torch.randn(size, size + 2, generator=generator, dtype=torch.float64)
    return root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def make(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for kind, out, size in kinds:
        if kind in ("weight", "left", "right", "both"):
            pair = [positive(out, generator), positive(size, generator)]
            diagonal = {"weight": (), "left": (0,), "right": (1,), "both": (0, 1)}[kind]  # sides that are diagonal
            factors.append([f.diagonal().clone() if side in diagonal else f for side, f in enumerate(pair)])
        elif kind == "bias":
            factors.append([positive(out, generator)])
        else:
            factors.append([torch.rand(out, generator=generator, dtype=torch.float64) + 0.1])
    return Kron(factors)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def sizes(kinds):
    return [out * size for _, out, size in kinds]


def close(value, truth):
    assert naive.relative_error(value, truth) < 1e-9


def dense(kron):
    return naive.kron_matrix(kron.kfacs)


@few
@given(blocks, seeds)
def test_dense_form_and_decomposition_agree(kinds, seed):
    kron = make(kinds, seed)
    truth = dense(kron)
    close(kron.to_matrix(), truth)
    close(kron.decompose().to_matrix(), truth)
    close(kron.diag(), truth.diagonal())
    assert len(kron) == len(kron.decompose()) == len(kinds)
    close(kron.logdet(), torch.logdet(truth))
    w = torch.randn(2, len(truth), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(kron.bmm(w), w @ truth)


@few
@given(blocks, seeds, st.floats(0.01, 100))
def test_addition_is_per_factor_and_scaling_scales_the_matrix(kinds, seed, scale):
    one, two = make(kinds, seed), make(kinds, seed + 1)
    expected = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(one.kfacs, two.kfacs, strict=True)]
    close((one + two).to_matrix(), naive.kron_matrix(expected))
    close((one * scale).to_matrix(), dense(one) * scale)
    close((scale * one).to_matrix(), dense(one) * scale)
    close((one * torch.tensor(scale, dtype=torch.float64)).to_matrix(), dense(one) * scale)


@few
@given(blocks, seeds, exponents, st.floats(0.01, 10), st.floats(0.01, 10))
def test_powers_of_scaled_and_shifted_products(kinds, seed, exponent, scale, delta):
    """``scale · H + delta I`` and its powers: dense, applied, diagonal, log determinant, quadratic form."""
    kron = make(kinds, seed)
    shifted = kron.decompose() * scale + delta
    plain = dense(kron) * scale + delta * torch.eye(sum(sizes(kinds)), dtype=torch.float64)
    truth = power(plain, exponent)
    close(shifted.to_matrix(exponent), truth)
    close(shifted.diag(exponent), truth.diagonal())
    close(shifted.logdet(), torch.logdet(plain))
    generator = torch.Generator().manual_seed(seed)
    for shape in ((), (2,), (2, 3)):
        w = torch.randn(*shape, len(truth), generator=generator, dtype=torch.float64)
        close(shifted.bmm(w, exponent), w @ truth)
    close(shifted.inv_square_form(w), w @ power(plain, -1) @ w.transpose(1, 2))


@few
@given(blocks, seeds)
def test_deltas_per_block_add_up(kinds, seed):
    kron = make(kinds, seed)
    deltas = torch.rand(len(kinds), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    per_parameter = torch.cat([d.expand(n) for d, n in zip(deltas, sizes(kinds), strict=True)])
    shifted = 0.5 + (kron.decompose() + deltas)
    close(shifted.to_matrix(), dense(kron) + torch.diag(per_parameter + 0.5))
    close(shifted.deltas, deltas + 0.5)
    # scaling is of the matrix, so the deltas added before it stay
    close((shifted * 3.0).to_matrix(), 3 * dense(kron) + torch.diag(per_parameter + 0.5))


@few
@given(blocks, seeds, exponents, st.floats(0.01, 10))
def test_damping_adds_the_root_to_each_factor(kinds, seed, exponent, delta):
    """(B + sqrt(delta) I) x (A + sqrt(delta) I) for weights, B + delta I for biases (Ritter et al., ICLR 2018)."""
    kron = make(kinds, seed)
    damped = kron.decompose(damping=True) * 2.0 + delta
    factors = []
    for fs in kron.kfacs:
        scaled = [2.0 ** (1 / len(fs)) * f for f in fs]
        shift = delta if len(fs) == 1 else delta**0.5
        factors.append([f + shift * (torch.eye(len(f)).double() if f.ndim == 2 else 1) for f in scaled])
    plain = naive.kron_matrix(factors)
    close(damped.to_matrix(exponent), power(plain, exponent))
    close(damped.logdet(), torch.logdet(plain))
    close(damped.diag(exponent), power(plain, exponent).diagonal())
    w = torch.randn(3, len(plain), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(damped.bmm(w, exponent), w @ power(plain, exponent))


def test_log_determinant_is_differentiable_in_deltas_and_scale():
    decomposed = make([("weight", 2, 3), ("bias", 2, 1), ("diagonal", 2, 1)], 0).decompose()
    deltas = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, s: (decomposed * s + d).logdet(), (deltas, scale))


def test_shared_factors_are_decomposed_once():
    kron = make([("weight", 3, 2)], 0)
    kron = Kron([kron.kfacs[0], [kron.kfacs[0][0]]])
    decomposed = kron.decompose()
    assert decomposed.eigenvectors[0][0] is decomposed.eigenvectors[1][0]
    close(decomposed.to_matrix(), dense(kron))


def test_zero_factors_follow_the_model():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(4, 2))
    kron = Kron.init_from_model(model, "cpu")
    assert [[tuple(f.shape) for f in fs] for fs in kron.kfacs] == [
        [(3, 3), (8, 8)],
        [(3, 3)],
        [(2, 2), (4, 4)],
        [(2, 2)],
    ]
    assert float(kron.to_matrix().norm()) == 0
    assert len(Kron.init_from_model(list(model.parameters())[:1], "cpu")) == 1
    assert {f.dtype for fs in Kron.init_from_model(model, "cpu", torch.float64).kfacs for f in fs} == {torch.float64}
    with pytest.raises(ValueError, match="without dimensions"):
        Kron.init_from_model([nn.Parameter(torch.tensor(1.0))], "cpu")


def test_eigenvalues_are_non_negative_and_vectors_orthonormal():
    root = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    values, vectors = symeig(root @ root.T)  # rank 2: rounding makes some eigenvalues slightly negative
    assert values.dtype == vectors.dtype == torch.float32
    assert float(values.min()) >= 0
    assert torch.allclose(vectors.T @ vectors, torch.eye(5), atol=1e-6)
    assert torch.allclose((vectors * values) @ vectors.T, root @ root.T, atol=1e-5)
    lower_triangle_differs = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    values, vectors = symeig(lower_triangle_differs)
    assert torch.allclose((vectors * values) @ vectors.T, torch.tensor([[2.0, 0.5], [0.5, 2.0]]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda k: k + 1, "Only Kron can be added to Kron, not int"),
        (lambda k: k + make([("weight", 3, 3)], 0), "different shapes"),
        (lambda k: k * torch.ones(2), "multiplied by a scalar"),
        (lambda k: k * "2", "multiplied by a scalar"),
        (lambda k: k.decompose() + torch.ones(3), "a scalar or 2 values, one per block"),
        (lambda k: k.decompose() * torch.ones(2), r"Expected a scalar, got a tensor of shape \(2,\)"),
        (lambda k: k.decompose().bmm(torch.ones(2, 4)), "last dimension of W is 4, but there are 8 parameters"),
        (lambda k: Kron([[k.kfacs[0][0] * float("nan")]]).decompose(), "block 0 holds NaN or Inf"),
        (lambda k: k * -1.0, "cannot be multiplied by -1: it is positive semi-definite"),
        (lambda k: k.decompose() * torch.tensor(-2.0), "cannot be multiplied by -2"),
        (
            lambda k: Kron([[torch.ones(2, 3)]]),
            r"Block 0 has factors of shapes \[\(2, 3\)\]; a block is one or two square",
        ),
        (lambda k: Kron([k.kfacs[1] * 3]), "a block is one or two square matrices"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    kron = make([("weight", 2, 3), ("bias", 2, 1)], 0)
    with pytest.raises(ValueError, match=message):
        call(kron)


def test_bare_decomposition_has_no_deltas():
    decomposed = KronDecomposed([[torch.eye(2)]], [[torch.tensor([1.0, 2.0])]])
    assert decomposed.deltas.tolist() == [0.0]
    assert decomposed.logdet().item() == pytest.approx(torch.tensor(2.0).log().item())


def test_rounded_zeros_cancel_in_the_log_determinant():
    """A float32 matrix of low rank: the exact log determinant is that of its float64 original."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 80, generator=generator, dtype=torch.float64) * torch.tensor([[100.0], [10.0], [1.0]])
    exact = root.T @ root
    noise = torch.randn(80, 80, generator=generator, dtype=torch.float64)
    noise = (noise + noise.T) * 3e-9 * float(exact.diagonal().max())  # as rounding to float32 would leave it
    delta = torch.tensor([0.1], dtype=torch.float64)
    truth = Kron([[exact]]).decompose() + delta
    rounded = Kron([[exact + noise]]).decompose() + delta
    ratio = float(truth.logdet_ratio())
    assert float(rounded.logdet_ratio()) == pytest.approx(ratio, rel=5e-3)
    clamped = [[rounded.eigenvalues[0][0].clamp(min=0)]]
    biased = KronDecomposed(rounded.eigenvectors, clamped) + delta
    assert float(biased.logdet_ratio()) > 1.03 * ratio  # what setting the negative half of them to zero would do
    assert float(truth.logdet_ratio()) == pytest.approx(float(truth.logdet() - 80 * delta.log()), rel=1e-12)
    tiny = Kron([[exact + noise]]).decompose() + 1e-12  # far below the rounding: stopped, never negative
    assert bool((tiny.spectrum(0) > 0).all())


def test_one_dimensional_factors_are_diagonal_ones():
    pair = [torch.tensor([4.0, 5.0]), torch.tensor([1.0, 2.0, 3.0])]
    assert torch.equal(Kron([pair]).to_matrix(), torch.diag(torch.tensor([4.0, 8.0, 12.0, 5.0, 10.0, 15.0])))
    decomposed = Kron([pair]).decompose() + 1.0
    assert torch.allclose(decomposed.to_matrix(-1).diagonal(), 1 / torch.tensor([5.0, 9.0, 13.0, 6.0, 11.0, 16.0]))


def test_detach_drops_the_graph_of_prior_and_noise():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    kron = make([("weight", 2, 3), ("left", 2, 2)], 0).decompose() * scale + scale
    assert kron.logdet().requires_grad
    assert not kron.detach().logdet().requires_grad
    close(kron.detach().to_matrix(), kron.to_matrix().detach())


# --- eigendecompositions that are hard to find -----------------------------------------------------------------------


def with_zero_rows(width, used, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(width, generator=generator)[:used]
    matrix = torch.zeros(width, width, dtype=torch.float64)
    matrix[places[:, None], places] = positive(used, generator)
    return matrix


@pytest.mark.parametrize("used", [0, 1, 7, 40])
def test_rows_of_zeros_are_left_out_of_the_search(used, monkeypatch):
    """Of ResNet-18's last convolutions on small images, 4,096 of 4,608 rows: divide and conquer does not converge."""
    widths, found = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: widths.append(len(M)) or found(M))
    matrix = with_zero_rows(40, used)
    values, vectors = eigh(matrix)
    assert widths == ([used] if used else [])
    assert torch.equal(values, values.sort().values)
    close(vectors.T @ vectors, torch.eye(40, dtype=torch.float64))
    assert float(((vectors * values) @ vectors.T - matrix).norm()) < 1e-12


@pytest.mark.parametrize("used", [0, 1, 7, 40])
def test_eigenvalues_alone_are_the_same_ones(used, monkeypatch):
    matrix, widths, found = with_zero_rows(40, used), [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda M: widths.append(len(M)) or found(M))
    close(eigenvalues(matrix), eigh(matrix)[0])
    assert widths == ([used] if used else [])
    kron = make([("weight", 4, 3), ("left", 2, 2), ("bias", 3, 1)], 0)
    for damping in (False, True):
        close((kron.eigenvalues(damping) * 2 + 3).logdet_ratio(), (kron.decompose(damping) * 2 + 3).logdet_ratio())


def no_convergence(M):
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")


def test_another_algorithm_follows_where_the_first_does_not_converge(monkeypatch):
    kron = make([("weight", 4, 3)], 0)
    truth = dense(kron)
    monkeypatch.setattr(torch.linalg, "eigh", no_convergence)
    close(kron.decompose().to_matrix(), truth)
    monkeypatch.setattr(torch.linalg, "eigvalsh", no_convergence)
    close(kron.eigenvalues().logdet(), truth.logdet())


def test_a_factor_without_eigendecomposition_is_named(monkeypatch):
    def fails(matrix, driver, **kwargs):
        raise scipy.linalg.LinAlgError("no convergence either")

    monkeypatch.setattr(torch.linalg, "eigh", no_convergence)
    monkeypatch.setattr(scipy.linalg, "eigh", fails)
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", "kron")
    la.fit(loader(x, y))
    with pytest.raises(
        ValueError, match=r"factor '0.weight/B' \(4, 4\) of block 0 has no eigendecomposition: .*either"
    ):
        _ = la.H
    monkeypatch.setattr(torch.linalg, "eigvalsh", no_convergence)
    with pytest.raises(ValueError, match=r"factor '0.weight/B' \(4, 4\) of block 0 has no eigendecomposition"):
        la.log_marginal_likelihood()


@pytest.mark.parametrize("shape", [(600, 600), (600,), (1, 1)])
def test_a_factor_is_divided_row_by_row_in_the_same_bits(shape):
    value = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(rounded_factor("0.weight/A", value, 7, dtype), (value / 7).to(dtype))
        assert torch.equal(rounded_factor("0.weight/B", value, 7, dtype), value.to(dtype))
