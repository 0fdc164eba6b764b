"""Variances of layers with several positions, from pairs of positions and from rows, against the rows by themselves in float64."""

import pytest
import torch

from laplace.capture import outer_variance
from laplace.capture.blocks import Basis
from laplace.capture.every_output import OutputGradients
from laplace.capture.outer_variance import add_outer_variance
from laplace.capture.weights import constant


def _case(positions, outputs=3, batch=5, out=7, width=11, priors=2, dtype=torch.float64):
    make = torch.Generator().manual_seed(positions)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(batch, positions, width), draw(batch, outputs, positions, out), draw(priors, out, width).square()


def _naive(a, g, w, diagonal):
    rows = torch.einsum("ncro,nri->ncoi", g.double(), a.double())
    found = torch.einsum("ncoi,toi,ndoi->tncd", rows, w.double(), rows)
    return found.diagonal(dim1=2, dim2=3) if diagonal else found


_PLAIN = Basis()


def _added(a, g, w, diagonal, basis=_PLAIN):
    total = torch.zeros_like(_naive(a, g, w, diagonal)).to(a.dtype)
    add_outer_variance(
        total, lambda i, j: a[i:j], OutputGradients(g.unbind(1)), basis, constant(*w), a.shape[1:], diagonal
    )
    return total


@pytest.fixture(params=["pairs", "pairs in ranges", "pairs as matrices", "rows", "small tiles"])
def way(request, monkeypatch):
    if "pairs" in request.param:
        monkeypatch.setattr(outer_variance, "_TRAFFIC", 10**9)
        monkeypatch.setattr(outer_variance, "_RANGE", 0 if "ranges" in request.param else 10**9)
        monkeypatch.setattr(outer_variance, "_multiplies_positions", lambda *sizes: "matrices" in request.param)
        return
    monkeypatch.setattr(outer_variance, "_TRAFFIC", -(10**9))
    if request.param == "small tiles":
        monkeypatch.setattr(outer_variance, "_TILE", 64)
        monkeypatch.setattr(outer_variance, "_WEIGHTS", 64)
        monkeypatch.setattr(outer_variance, "_PAIRS", 64)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("positions", [1, 2, 5])
def test_both_ways_give_the_variances_of_the_rows(way, positions, diagonal):
    a, g, w = _case(positions)
    torch.testing.assert_close(_added(a, g, w, diagonal), _naive(a, g, w, diagonal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("matrices", [True, False])
def test_positions_that_cancel_lose_no_digits(monkeypatch, matrices, diagonal):
    """Inputs that are the same everywhere under gradients without a mean, as an instance norm passes them down."""
    monkeypatch.setattr(outer_variance, "_TRAFFIC", 10**9)
    monkeypatch.setattr(outer_variance, "_multiplies_positions", lambda *sizes: matrices)
    a, g, w = _case(4, dtype=torch.float32)
    a = a[:, :1] + 1e-3 * a
    g = 300 * (g - g.mean(2, keepdim=True))
    expected = _naive(a, g, w, diagonal)
    assert (_added(a, g, w, diagonal) - expected).norm() <= 1e-3 * expected.norm()  # the rows' own digits
    a = a[:, :1].expand_as(a)
    variances = _added(a, g, w, True)
    assert bool((variances >= 0).all()) and float(variances.max()) < 1e-5  # 1e4 from pairs, of either sign


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("positions", [1, 4])
def test_units_that_are_off_in_all_examples_take_no_products(monkeypatch, positions, diagonal):
    monkeypatch.setattr(outer_variance, "_TRAFFIC", 10**9)
    a, g, w = _case(positions)
    a[..., 1:10] = 0
    g[..., :3] = 0
    asked = []

    def weight(priors, rows, columns):
        asked.append((rows.tolist(), columns.tolist()))
        return constant(*w)(priors, rows, columns)

    total = torch.zeros_like(_naive(a, g, w, diagonal))
    gradients = OutputGradients(g.unbind(1))
    add_outer_variance(total, lambda i, j: a[i:j], gradients, Basis(), weight, a.shape[1:], diagonal)
    assert asked == [([3, 4, 5, 6], [0, 10])]
    torch.testing.assert_close(total, _naive(a, g, w, diagonal), rtol=1e-12, atol=1e-12)
    assert not _added(a * 0, g, w, diagonal).any()


@pytest.mark.parametrize(
    ("priors", "outputs", "positions", "matrices"),
    [(1, 100, 64, True), (10, 100, 64, True), (1, 10, 16, True), (100, 10, 16, False), (1, 100, 1, False)],
)
def test_pairs_are_matrices_where_outputs_are_many_and_priors_few(monkeypatch, priors, outputs, positions, matrices):
    monkeypatch.setattr(outer_variance, "_TRAFFIC", 10**9)
    taken = []
    for name in ("_add_by_matrices_", "_add_by_squares_"):
        real = getattr(outer_variance, name)
        monkeypatch.setattr(outer_variance, name, lambda *args, real=real, name=name: taken.append(name) or real(*args))
    a, g, w = _case(positions, outputs, batch=2, out=3, width=4, priors=priors)
    torch.testing.assert_close(_added(a, g, w, True), _naive(a, g, w, True), rtol=1e-12, atol=1e-12)
    assert set(taken) == {"_add_by_matrices_" if matrices else "_add_by_squares_"}


def test_few_positions_are_taken_in_pairs_and_many_by_rows(monkeypatch):
    taken = []
    for name in ("_by_pairs", "_add_rows"):
        real = getattr(outer_variance, name)
        monkeypatch.setattr(outer_variance, name, lambda *args, real=real, name=name: taken.append(name) or real(*args))
    _added(*_case(4, outputs=10), True)
    _added(*_case(40, outputs=10), True)
    assert taken == ["_by_pairs", "_add_rows"]


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("positions, late", [(5, ""), (8, "left"), (16, "right"), (40, "left right")])
def test_bases_may_turn_the_rows_instead_of_gradients_and_inputs(monkeypatch, positions, late, sides, diagonal):
    monkeypatch.setattr(outer_variance, "_TRAFFIC", -(10**9))
    wide = late == "right"  # more inputs than positions
    a, g, w = _case(positions, outputs=2, out=7 if wide or positions > 16 else 9, width=29 if wide else 7)
    turn = lambda n: torch.linalg.qr(torch.randn(n, n, dtype=a.dtype, generator=torch.Generator().manual_seed(n)))[0]  # noqa: E731
    basis = Basis(turn(g.shape[-1]) if sides[0] else None, turn(a.shape[-1]) if sides[1] else None)
    _, last = outer_variance._split(basis, *g.shape[1:], a.shape[-1])
    asked = [side for side, there in zip(("left", "right"), sides, strict=True) if there and side in late.split()]
    assert [side for side in ("left", "right") if getattr(last, side) is not None] == asked
    turned = [v if q is None else v @ q for v, q in ((a, basis.right), (g, basis.left))]
    torch.testing.assert_close(_added(a, g, w, diagonal, basis), _naive(*turned, w, diagonal), rtol=1e-11, atol=1e-11)
