"""Sums that hold some rows of some factors have there the bits of the whole sum, for every structure and every cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.backends.gauss_newton import GGNInterface
from laplace.backends.native import NativeEF, NativeGGN
from laplace.linalg import gram
from laplace.structures.ekfac import Eigenbasis
from laplace.structures.specification import row_cuts

N = 37


def data(width=20, classes=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, width, generator=generator), torch.randint(0, classes, (N,), generator=generator)


def mlp(width=20, hidden=16, classes=3):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes)).eval()


def token_model():
    """Weights that positions share, a norm and a table of words: every kind of rule."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    ).eval()


def posterior(model, structure, subset="all", backend=NativeGGN, **kwargs):
    return Laplace(
        model, "classification", subset_of_weights=subset, hessian_structure=structure, backend=backend, **kwargs
    )


def accumulated(la, x, y, rows=None, zero=None):
    sums = (zero or la.zero_sums)(rows)
    for start in range(0, N, 10):
        la.accumulate(sums, x[start : start + 10], y[start : start + 10], offset=start)
    return sums


def shares(spec):
    """Every factor alone, every piece of a factor that can be cut alone, and two halves of everything."""
    for name, factor in spec.factors.items():
        cuts = row_cuts(factor)
        yield from ({name: pair} for pair in zip(cuts, cuts[1:], strict=False))
        yield {name: (0, cuts[-1])}
    names = list(spec.factors)
    half = len(names) // 2
    for some in (names[:half], names[half:]):
        if some:
            yield {name: (0, row_cuts(spec.factors[name])[-1]) for name in some}


def check(whole, part, rows):
    assert set(part.tensors) == set(rows)
    for name, (start, stop) in rows.items():
        value = whole.tensors[name]
        wanted = value[start:stop, :stop] if whole.spec.factors[name].symmetric else value
        assert torch.equal(part.tensors[name], wanted), (name, start, stop)
    assert torch.equal(part.loss, whole.loss) and part.n_data == whole.n_data == N


CASES = {
    "kron": lambda: (posterior(mlp(width=250), "kron"), data(250)),
    "kron with shared weights and a diagonal": lambda: (posterior(token_model(), "kron"), words()),
    "kron of a last layer": lambda: (posterior(mlp(hidden=250), "kron", "last_layer"), data()),
    "empirical Fisher": lambda: (posterior(mlp(), "kron", backend=NativeEF), data()),
    "diag": lambda: (posterior(mlp(), "diag"), data()),
    "diag with shared weights": lambda: (posterior(token_model(), "diag"), words()),
    "diag of a last layer": lambda: (posterior(mlp(), "diag", "last_layer"), data()),
    "full": lambda: (posterior(mlp(), "full"), data()),
    "full of a last layer": lambda: (posterior(mlp(hidden=90), "full", "last_layer"), data()),
    "full of a wide last layer": lambda: (posterior(mlp(hidden=210), "full", "last_layer"), data()),
    "blockdiag": lambda: (posterior(mlp(), "blockdiag"), data()),
    "another backend's full": lambda: (posterior(mlp(), "full", backend=GGNInterface), data()),
    "another backend's diag": lambda: (posterior(mlp(), "diag", backend=GGNInterface), data()),
    "full of a subnetwork": lambda: (subnetwork("full"), data()),
    "diag of a subnetwork": lambda: (subnetwork("diag"), data()),
}


def words():
    generator = torch.Generator().manual_seed(6)
    return torch.randint(0, 11, (N, 4), generator=generator), torch.randint(0, 3, (N,), generator=generator)


def subnetwork(structure):
    chosen = torch.arange(0, 387, 1 if structure == "diag" else 2)[:230]
    return posterior(mlp(), structure, "subnetwork", subnetwork_indices=chosen)


@pytest.mark.parametrize("name", CASES)
def test_a_part_has_the_bits_of_the_whole(name):
    la, (x, y) = CASES[name]()
    la.initialize(x)
    whole = accumulated(la, x, y)
    assert all(bool(value.any()) for value in whole.tensors.values())
    for rows in shares(la.sums_spec()):
        check(whole, accumulated(la, x, y, rows), rows)


def test_second_moments_in_parts():
    la, (x, y) = posterior(mlp(), "ekfac"), data()
    la.initialize(x)
    la.basis = Eigenbasis.of(accumulated(la, x, y))
    la.initialize(x)
    whole = accumulated(la, x, y)
    for rows in shares(whole.spec):
        check(whole, accumulated(la, x, y, rows), rows)


def test_rows_of_a_full_curvature_are_those_of_its_definition():
    """In float64 from dense Jacobians: Σ J[:, a:b]ᵀ Λ J[:, :b]; whatever the pieces are, they make the whole."""
    model, (x, y) = mlp().double(), data()
    x = x.double()
    la = posterior(model, "full")
    la.initialize(x)
    js, f = la.backend.jacobians(x)
    p = f.softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    size = js.shape[-1]
    cuts = row_cuts(la.sums_spec().factors["full"])
    assert len(cuts) > 3 and cuts[-1] == size
    for start, stop in zip(cuts, cuts[1:], strict=False):
        sums = accumulated(la, x, y, {"full": (start, stop)})
        held = sums.tensors["full"]
        assert held.shape == (stop - start, stop)
        wanted = torch.einsum("nca,ncd,ndb->ab", js[..., start:stop], middle, js[..., :stop])
        assert torch.allclose(held, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width", [1, 60, 129, 192, 193, 400])
def test_gram_matrices_of_any_width_are_symmetric_and_right(width):
    rows = torch.randn(300, width, generator=torch.Generator().manual_seed(width))
    total = torch.zeros(width, width, dtype=torch.float64)
    gram.add_gram_(total, [rows[:100], rows[100:]])
    gram.mirror_(total)
    wanted = rows.double().T @ rows.double()
    assert float((total - wanted).norm() / wanted.norm()) < 2e-6
    assert float((total - total.T).abs().max()) <= 1e-5 * float(total.abs().max())


def test_parts_that_hold_other_rows_do_not_merge():
    la, (x, y) = posterior(mlp(), "diag"), data()
    la.initialize(x)
    names = list(la.sums_spec().factors)
    one, two = (accumulated(la, x, y, {name: (0, 1)}) for name in names[:2])
    with pytest.raises(AssertionError, match="hold different rows"):
        one.merge(two)


def test_what_a_part_takes_is_what_it_holds(monkeypatch):
    """The refusal before an allocation counts the rows that are held, not the whole."""
    la = posterior(mlp(), "full")
    la.initialize(data()[0])
    needed = []
    monkeypatch.setattr("laplace.structures.sums.memory.require", lambda size, *rest: needed.append(size))
    cuts = row_cuts(la.sums_spec().factors["full"])
    la.zero_sums({"full": (cuts[1], cuts[2])})
    assert needed == [8 * (cuts[2] - cuts[1]) * cuts[2]]


def test_a_group_of_input_factors_takes_one_backward_pass(monkeypatch):
    la, (x, y) = posterior(mlp(), "kron"), data()
    la.initialize(x)
    calls = []
    from laplace.capture.capture import Capture

    before = Capture.gradients
    monkeypatch.setattr(Capture, "gradients", lambda self, v: calls.append(1) or before(self, v))
    la.accumulate(la.zero_sums({"0.weight/A": (0, 20)}), x, y)
    assert len(calls) == 1
