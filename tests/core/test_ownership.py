"""What is given to sums and posteriors is never written to, and sums do not share memory with it."""

from __future__ import annotations

import pytest
import torch

from laplace import Laplace
from laplace.linalg import memory
from laplace.structures.sums import CurvatureSums, sum_in_order
from laplace.utils.matrix import Kron

from .models import CASES, loader

STRUCTURES = ("full", "kron", "diag")
DTYPES = (torch.float32, torch.float64)


def fitted(structure, dtype):
    model, x, y = CASES["mlp"].make(dtype=dtype)
    la = Laplace(model, "classification", "all", structure)
    la.fit(loader(x, y))
    return la, x, y


def copies(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def unchanged(tensors, before):
    return tensors.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_tensors_that_sums_are_rebuilt_from(structure, dtype):
    la, x, y = fitted(structure, dtype)
    given = copies(la.sums.to_tensors())
    before = copies(given)
    sums = CurvatureSums.from_tensors(la.sums_spec(), given, 5)
    la.accumulate(sums, x, y)
    sums.merge(la.sums)
    sums.loss += 1
    assert unchanged(given, before)


def test_tensors_that_are_given_away_are_those_of_the_sums():
    la, x, y = fitted("kron", torch.float32)
    given = copies(la.sums.to_tensors())
    sums = CurvatureSums.from_tensors(la.sums_spec(), given, 5, own=True)
    la.accumulate(sums, x, y)
    assert all(sums.to_tensors()[name] is value for name, value in given.items() if name != "loss")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sums_of_older_stored_types_are_taken(structure):
    la, _, _ = fitted(structure, torch.float32)
    stored = {name: value.float() for name, value in la.sums.to_tensors().items()}
    sums = CurvatureSums.from_tensors(la.sums_spec(), stored, 5)
    assert {value.dtype for value in sums.to_tensors().values()} == {torch.float64}
    assert all(torch.equal(value, sums.to_tensors()[name].float()) for name, value in stored.items())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_other_side_of_a_merge(structure):
    la, x, y = fitted(structure, torch.float64)
    before = copies(la.sums.to_tensors())
    total = la.zero_sums().merge(la.sums)
    la.accumulate(total, x, y)
    assert unchanged(la.sums.to_tensors(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sums_that_a_posterior_was_set_to(structure, dtype):
    la, x, y = fitted(structure, dtype)
    given = la.sums
    before = copies(given.to_tensors())
    la.set_sums(given)
    la.fit(loader(x, y), override=False)
    la.log_marginal_likelihood()
    la(x)
    assert la.sums is not given and la.n_data == 10
    assert unchanged(given.to_tensors(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank"])
def test_a_state_dict_that_was_loaded(structure, dtype):
    la, x, y = fitted(structure, dtype)
    state = la.state_dict()
    before = copies(state["sums"])
    other = Laplace(la.model, "classification", "all", structure)
    other.load_state_dict(state)
    assert unchanged(other.state_dict()["sums"], before)
    assert torch.equal(other(x), la(x))
    for value in other.sums.to_tensors().values():
        value += 1
    assert unchanged(state["sums"], before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_and_weights(structure):
    la, x, y = fitted(structure, torch.float32)
    given = {"x": x, "y": y, **dict(la.model.named_parameters())}
    before = copies(given)
    la.accumulate(la.zero_sums(), x, y)
    assert unchanged(given, before)


def test_terms_of_sums_of_kron_and_of_tensors():
    one, two = Kron([[torch.eye(2)]]), Kron([[torch.ones(2, 2)]])
    total = one + two
    total.kfacs[0][0] += 1
    assert torch.equal(one.kfacs[0][0], torch.eye(2)) and torch.equal(two.kfacs[0][0], torch.ones(2, 2))
    first = torch.ones(3, dtype=torch.float64)
    sum_in_order([first, first])
    assert torch.equal(first, torch.ones(3, dtype=torch.float64))


def test_sums_in_order_are_of_the_widest_type():
    narrow, wide = torch.ones(1), torch.full((1,), 2.0**-40, dtype=torch.float64)
    assert sum_in_order([narrow, narrow]).dtype is torch.float32
    for terms in ([narrow, wide], [wide, narrow]):
        assert sum_in_order(terms).item() == 1 + 2.0**-40


@pytest.mark.parametrize("structure", STRUCTURES)
def test_posteriors_are_of_the_models_type_and_sums_of_float64(structure, monkeypatch):
    la, _, _ = fitted(structure, torch.float32)
    h = torch.cat([f.flatten() for fs in la.H_facs.kfacs for f in fs]) if structure == "kron" else la.H
    assert h.dtype is torch.float32
    assert la.log_marginal_likelihood().dtype is torch.float64
    assert {value.dtype for value in la.sums.to_tensors().values()} == {torch.float64}
    needed = sum(value.numel() * 8 for value in la.sums.tensors.values())
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(MemoryError, match=f"needs {needed:,} bytes"):
        la.zero_sums()


def test_blocks_below_the_diagonal_follow_when_sums_are_read():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 3))
    la = Laplace(model, "classification", "all", "kron")
    x, y = torch.randn(8, 300), torch.randint(3, (8,))
    la.initialize(x)
    sums = la.zero_sums()
    for _ in range(2):
        la.accumulate(sums, x, y)
        factor = sums.tensors["0.weight/A"]
        assert torch.equal(factor, factor.T) and float(factor[250, 10]) != 0
