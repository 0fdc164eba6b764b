"""Padded tokens are no positions of a layer: Kronecker factors against dense algebra, and where the mask is of something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.capture.padding import kept_tokens, position_weights

from . import naive


class Pooled(nn.Module):
    """Tokens, a layer of each, and their mean: with the mask, or over all positions as if there were none."""

    def __init__(self, heeds=True):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer, self.head = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.heeds = heeds
        self.double()

    def forward(self, data):
        mask = data["attention_mask"].to(torch.float64)
        mask = mask if self.heeds else torch.ones_like(mask)
        h = self.layer(self.words(data["input_ids"])).tanh()
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def batch(lengths=(3, 1, 4), time=4, word=0):
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), time), word)
    mask = torch.zeros(len(lengths), time, dtype=torch.long)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = torch.randint(1, 9, (n,), generator=generator), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])[: len(lengths)]}


def fitted(model, data, **kwargs):
    la = Laplace(model, "classification", "all", "kron", backend_kwargs=kwargs)
    la.fit([data])
    return la.sums.to_tensors()


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_are_means_over_the_tokens(approx):
    model, data = Pooled(), batch()
    sums, wanted = fitted(model, data, kfac_approx=approx), 0.0
    for i, n in enumerate((3, 1, 4)):
        a = model.words(data["input_ids"][i, :n]).detach()
        a = a.mean(0, keepdim=True) if approx == "reduce" else a
        wanted = wanted + a.T @ a / len(a)
    assert naive.relative_error(sums["layer.weight/A"], wanted) < 1e-12


@pytest.mark.parametrize("change", [{"time": 9}, {"word": 7}])
@pytest.mark.parametrize("kwargs", [{}, {"kfac_approx": "reduce"}, {"stochastic": True, "seed": 3}])
def test_how_far_and_with_what_a_batch_is_padded_changes_nothing(change, kwargs):
    one, other = fitted(Pooled(), batch(), **kwargs), fitted(Pooled(), batch(**change), **kwargs)
    for name, value in one.items():
        assert naive.relative_error(other[name], value) < 1e-12, name


def test_without_padding_nothing_changes():
    data = batch((4, 4, 4))
    whole = fitted(Pooled(), data)
    assert kept_tokens(data) is None
    a = Pooled().words(data["input_ids"]).detach()
    assert naive.relative_error(whole["layer.weight/A"], sum(x.T @ x for x in a) / 4) < 1e-12


def test_positions_that_the_model_uses_count_whatever_the_mask_says():
    data = batch()
    a = Pooled().words(data["input_ids"]).detach()
    sums = fitted(Pooled(heeds=False), data)
    assert naive.relative_error(sums["layer.weight/A"], sum(x.T @ x for x in a) / 4) < 1e-12


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3),
        {"input_ids": torch.ones(2, 3)},
        {"attention_mask": torch.ones(2, 3)},
        {"attention_mask": torch.zeros(2, 1, 3, 3).bool()},
        {"attention_mask": torch.ones(2, 3).long()},
        {"attention_mask": [[1, 0]]},
    ],
)
def test_what_is_no_mask_of_tokens(x):
    assert kept_tokens(x) is None


def test_weights_of_several_calls_and_of_other_positions():
    kept = torch.tensor([[True, False], [True, True], [False, False]])
    g = torch.zeros(3, 4, 5)
    weights = position_weights(kept, 4, g)
    assert torch.equal(weights, torch.tensor([[0.5, 0, 0.5, 0], [0.25] * 4, [0.0] * 4]))
    assert position_weights(kept, 3, g[:, :3]) is None, "three positions are no two tokens"
    g[0, 1, 2] = 1e-30
    assert position_weights(kept, 4, g) is None


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_weights_of_examples_and_of_positions_go_together(approx):
    """An example of weight 2 is that example twice, however many of its positions are tokens."""
    model, data = Pooled(), batch()
    la = Laplace(model, "classification", "all", "kron", backend_kwargs={"kfac_approx": approx})
    la.initialize(data)
    found = []
    for times, weights in ((torch.arange(3), torch.tensor([2.0, 0.0, 1.0])), (torch.tensor([0, 0, 2]), None)):
        sums, part = la.zero_sums(), {name: value[times] for name, value in data.items()}
        la.accumulate(sums, part, part["labels"], example_weights=weights)
        found.append(sums.tensors)
    for name, value in found[1].items():
        assert naive.relative_error(found[0][name], value) < 1e-12, name
