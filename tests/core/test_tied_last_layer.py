"""A last layer whose weight is an embedding's too, as language models have it: features fixed, whatever else the weight does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from laplace import Laplace

from .naive import relative_error
from .test_uses import Function

STRUCTURES = ["full", "diag", "kron", "ekfac"]


def words(tied):
    torch.manual_seed(0)
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight if tied else nn.Parameter(table.weight.detach().clone())
    return Function(lambda m, x: m.head(m.table(x).mean(1).tanh()), table=table, head=head).double().eval()


def fitted(structure, tied):
    la = Laplace(words(tied), "classification", "last_layer", structure)
    la.fit([(torch.arange(18).reshape(6, 3) % 5, torch.arange(6) % 5)])
    return la


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_is_that_of_a_copy_of_the_weight(structure):
    one, other, x = fitted(structure, True), fitted(structure, False), torch.arange(9).reshape(3, 3) % 5
    torch.testing.assert_close(one(x), other(x))
    torch.testing.assert_close(one.log_marginal_likelihood(), other.log_marginal_likelihood())
    draws = (la.functional_samples(x, "nn", 5, generator=torch.Generator().manual_seed(0)) for la in (one, other))
    assert relative_error(*draws) < 1e-12


@pytest.mark.parametrize("structure", STRUCTURES)
def test_its_state_loads(structure):
    la, x = fitted(structure, True), torch.arange(9).reshape(3, 3) % 5
    other = Laplace(words(True), "classification", "last_layer", structure)
    other.load_state_dict(copy.deepcopy(la.state_dict()))
    torch.testing.assert_close(other(x), la(x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_last_layer_by_its_second_name(structure):
    model, x = words(True), torch.arange(9).reshape(3, 3) % 5
    model.classifier = model.head
    la = Laplace(model, "classification", "last_layer", structure, last_layer_name="classifier")
    la.fit([(torch.arange(18).reshape(6, 3) % 5, torch.arange(6) % 5)])
    torch.testing.assert_close(la(x), fitted(structure, True)(x))
    other = Laplace(model, "classification", "last_layer", structure)
    other.load_state_dict(la.state_dict())
    torch.testing.assert_close(other(x), la(x))
