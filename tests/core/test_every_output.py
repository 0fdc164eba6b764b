"""Gradients of every output of one example, which copies of it take together, against one backward pass for each."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.capture import every_output
from laplace.capture.contractions import output_directions
from laplace.capture.every_output import gradients_of_outputs

torch.manual_seed(0)


class Scaled(nn.Module):
    """A layer, and a scale and a shift of its own that no module applies."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.shift = nn.Linear(6, 9), nn.Parameter(torch.rand(9)), nn.Parameter(torch.rand(9))

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.scale + self.shift.relu()


class Words(nn.Module):
    """Keys of a mapping, one of which is no tensor."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 9)

    def forward(self, batch):
        assert batch["kind"] == "words"
        return (self.head(self.table(batch["ids"])) * batch["mask"][..., None]).sum(1)


class Counting(nn.Module):
    """Answers otherwise where there are several examples, once it counts them."""

    def __init__(self):
        super().__init__()
        self.layer, self.counts = nn.Linear(6, 9), False

    def forward(self, x):
        return self.layer(x) * (len(x) if self.counts else 1)


CASES = {
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2, groups=1), nn.Flatten(),
            nn.Linear(12, 9),
        ),
        torch.rand(1, 2, 7, 7),
    ),
    "no module": (Scaled(), torch.rand(1, 6)),
    "mapping": (Words(), {"ids": torch.tensor([[1, 3, 3]]), "mask": torch.tensor([[1.0, 1.0, 0.0]]), "kind": "words"}),
    "positions": (nn.Linear(6, 3), torch.rand(1, 4, 6)),
}  # fmt: skip


def captured(model, x):
    model = model.double().eval()
    x = {k: v.double() if k == "mask" else v for k, v in x.items()} if isinstance(x, dict) else x.double()
    la = Laplace(model, "classification", "all", "diag")
    la.initialize(x)
    return la.backend.capture(x)


def whole(found):
    return {name: g if isinstance(g, torch.Tensor) else g.of() for name, g in found.items()}


def one_by_one(capture):
    found = [capture.gradients(v) for v in output_directions(capture.f)]
    return {name: torch.stack([gradients[name] for gradients in found], 1) for name in found[0]}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at_once", [None, 4])
def test_copies_give_what_one_backward_pass_for_each_output_does(monkeypatch, name, at_once):
    capture = captured(*CASES[name])
    capture.watch = None
    if at_once is not None:
        monkeypatch.setattr(every_output, "_TOGETHER", at_once * capture.width)
        monkeypatch.setattr(every_output, "_FEWEST", 2)
    passes = []
    capture.gradients, single = lambda v: passes.append(v), capture.gradients
    found = whole(gradients_of_outputs(capture))
    assert not passes, "the copies' capture has made them"
    capture.gradients = single
    expected = one_by_one(capture)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert torch.allclose(found[key], value, rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("kind", ["another answer", "several examples", "watched", "large", "few outputs"])
def test_where_copies_would_not_do_there_is_one_pass_for_each_output(monkeypatch, kind):
    model = (Counting() if kind == "another answer" else Scaled()).double().eval()
    x = torch.rand(2 if kind == "several examples" else 1, 6).double()
    la = Laplace(model, "classification", "all", "diag")
    la.initialize(x)
    model.counts = True
    capture = la.backend._unchecked_capture(x)
    if kind == "watched":
        capture.watch = lambda gradients: None
    if kind == "large":
        monkeypatch.setattr(every_output, "_TOGETHER", 7 * capture.width)
    if kind == "few outputs":
        monkeypatch.setattr(every_output, "_FEWEST", 10)
    passes, single = [], capture.gradients
    capture.gradients = lambda v: passes.append(v) or single(v)
    found = whole(gradients_of_outputs(capture))
    assert len(passes) == 9
    for key, value in one_by_one(capture).items():
        assert torch.equal(found[key], value), key


class Spoken(nn.Module):
    """Takes a list of strings, or an object that holds rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 9)

    def forward(self, x):
        return self.layer(x.rows if isinstance(x, Held) else torch.tensor([[len(w), ord(w[0]) / 99] for w in x]))


class Held:
    def __init__(self, rows):
        self.rows = rows

    def to(self, device):
        return self


@pytest.mark.parametrize(
    ("batch", "one"), [(["ab", "cde", "f"], ["ab"]), (Held(torch.eye(3)[:, :2]), Held(torch.eye(3)[:1, :2]))]
)
def test_a_single_example_that_is_no_tensor_is_predicted_like_one_of_a_batch(batch, one):
    la = Laplace(Spoken(), "classification", "all", "diag")
    la.fit([(batch, torch.arange(3))])
    assert torch.allclose(la(one), la(batch)[:1], atol=1e-6)


def test_copies_of_an_example_change_no_running_statistics():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9))
    la = Laplace(model.eval(), "classification", "all", "diag")
    la.fit([(torch.rand(4, 6), torch.arange(4))])
    capture = la.backend.capture(torch.rand(1, 6))
    before = model.train()[1].running_mean.clone()
    gradients_of_outputs(capture)
    assert torch.equal(model[1].running_mean, before) and model.training
