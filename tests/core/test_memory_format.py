"""Images with their channels last in memory: the same numbers, and models that cannot do with it run as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.capture import memory_format


class Net(nn.Module):
    """A convolution and a layer, with what lies between them given."""

    def __init__(self, between, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.between, self.seen = between, []
        self.conv, self.head = nn.Conv2d(channels, 4, 3, stride=2, padding=1), nn.Linear(64, 3)

    def forward(self, x):
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) == 1)
        return self.head(self.between(torch.relu(self.conv(x))))


def flattened(x):
    return x.flatten(1)


def viewed(x):
    return x.view(len(x), -1)


def data(channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, channels, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)


def sums(la, x, y):
    found = la.zero_sums()
    la.accumulate(found, x, y, 0)
    return found.tensors


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("between", [flattened, viewed])
def test_the_numbers_are_those_of_float64_in_the_usual_format(between, channels, structure):
    model, (x, y) = Net(between, channels), data(channels)
    la = Laplace(model, "classification", "all", structure)
    la.fit([(x, y)])
    exact = Laplace(Net(between, channels).double(), "classification", "all", structure)
    exact.fit([(x.double(), y)])
    for name, value in sums(exact, x.double(), y).items():
        assert torch.allclose(sums(la, x, y)[name], value, rtol=1e-5, atol=1e-6 * value.abs().max()), name
    assert torch.allclose(la(x).double(), exact(x.double()), atol=1e-5)


def test_a_model_that_takes_views_is_run_as_it_is_and_not_tried_again():
    model, (x, y) = Net(viewed), data()
    la = Laplace(model, "classification", "all", "kron")
    la.fit([(x, y)])
    tried = sum(model.seen)
    assert tried == 1 and model in memory_format._PLAIN
    la.fit([(x, y)])
    assert sum(model.seen) == 1


def test_what_a_model_does_to_its_input_is_done_once():
    """The first run, which fails, has a copy."""

    def doubled(model, x):
        x.mul_(2)
        return Net.forward(model, x)

    changing, (x, y) = type("Changing", (Net,), {"forward": doubled})(viewed), data()
    before = x.clone()
    la = Laplace(changing, "classification", "all", "diag")
    la.fit([(x, y)])
    plain = Laplace(Net(viewed), "classification", "all", "diag")
    plain.fit([(2 * before, y)])
    assert torch.equal(x, before) and torch.allclose(la.H, plain.H, rtol=1e-5)


def test_another_error_of_the_model_is_not_hidden():
    def broken(x):
        raise RuntimeError("of the model's own")

    with pytest.raises(ValueError, match="of the model's own"):
        Laplace(Net(broken), "classification", "all", "kron").fit([data()])
