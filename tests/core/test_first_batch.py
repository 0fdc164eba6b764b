"""What the first batch is asked: how many passes that takes, and that what takes fewer accepts nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.capture.soundness import _same, check_function
from laplace.capture.verdicts import _is_product


def net(*sizes):
    """Return a network of linear layers with ReLUs between them."""
    layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1]).eval()


def passes(model, what):
    """Return how many forward passes something makes."""
    seen = []
    handle = model.register_forward_hook(lambda *args: seen.append(1))
    what()
    handle.remove()
    return len(seen)


def test_examples_are_run_once_by_themselves():
    """One pass comes before, then two of all examples, and those of five parts of them."""
    model, x = net(3, 4, 2), torch.randn(8, 3)
    assert passes(model, lambda: check_function(model, x)) == 8


def test_a_part_of_the_examples_that_fails_is_named():
    """As one that needs several examples does, whose module is said."""

    class Pairs(nn.Module):
        def forward(self, x):
            if len(x) < 2:
                raise RuntimeError("needs two")
            return x

    model = nn.Sequential(nn.Linear(3, 2), Pairs()).eval()
    with pytest.raises(ValueError, match="of one example by itself fails in module '1' .*needs two"):
        check_function(model, torch.randn(4, 3))


def test_a_first_batch_is_asked_in_few_passes():
    """Of all weights: besides those eight one for what is captured, one for the outputs, and that of the fit."""
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    for subset, most in (("all", 11), ("last_layer", 13)):
        model = net(3, 4, 2)
        la = Laplace(model, "classification", subset, "diag")
        assert passes(model, lambda la=la: la.fit([(x, y)])) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_an_outer_product_is_known_and_nothing_else(dtype, size):
    """A gradient that is off by more than rounding in one entry is left to a closer look."""
    torch.manual_seed(0)
    layer, spacing = nn.Linear(5, 4), torch.finfo(dtype).eps
    a, g = size * torch.randn(1, 1, 5).double(), torch.randn(1, 1, 4).double()
    gradient = (g[0].T @ a[0]).to(dtype)
    assert _is_product(layer, gradient, a, g, spacing)
    wrong = gradient.clone()
    wrong[2, 3] += 1e-3 * gradient.norm()
    assert not _is_product(layer, wrong, a, g, spacing)
    assert not _is_product(layer, torch.full_like(gradient, torch.nan), a, g, spacing)
    assert not _is_product(layer, torch.zeros_like(gradient), a, g, spacing)


def test_gradients_whose_squares_vanish_in_float32_are_looked_at_closer():
    """The difference of two of them has no norm in float32, as if they were equal."""
    layer, a, g = nn.Linear(5, 4), torch.full((1, 1, 5), 1e-12).double(), torch.full((1, 1, 4), 1e-12).double()
    assert not _is_product(layer, torch.full((4, 5), 3e-24), a, g, torch.finfo(torch.float32).eps)


def test_other_layers_and_several_positions_are_looked_at_closer():
    """Their rows are no single products."""
    a, g, gradient = torch.ones(1, 2, 3).double(), torch.ones(1, 2, 4).double(), torch.ones(4, 3)
    assert not _is_product(nn.Linear(3, 4), gradient, a, g, 1e-7)
    assert not _is_product(nn.LayerNorm(3), torch.ones(3), a[:, :1], a[:, :1], 1e-7)
    assert not _is_product(nn.Linear(3, 4), gradient.bfloat16(), a[:, :1], g[:, :1], 1e-2)


@pytest.mark.parametrize(
    ("one", "two", "beside", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0], None, True),
        ([1.0, 2.0], [1.0, 2.001], None, False),
        ([1.0, 2.0], [1.0, 2.001], [1e4], True),
        ([torch.nan, 2.0], [1.0, 2.0], None, True),
        ([1.0, 2.0], [torch.nan, 2.0], None, False),
        ([torch.inf, 2.0], [1.0, 2.0], None, True),
        ([1.0, 2.0], [torch.inf, 2.0], None, True),
        ([1.0, 2.0], [1.0, 2.001], [torch.inf], True),
        ([1, 2], [1, 3], None, False),
        ([True, False], [True, False], None, True),
    ],
)
def test_values_are_the_same_up_to_rounding_of_the_largest(one, two, beside, same):
    """What is not finite is refused elsewhere, with the numbers of its examples."""
    assert _same(torch.tensor(one), torch.tensor(two), 1e-6, None if beside is None else torch.tensor(beside)) is same


class Ended(nn.Module):
    """A network that does something with what its last layer gives."""

    def __init__(self, end):
        super().__init__()
        self.body, self.head, self.end = nn.Linear(3, 4), nn.Linear(4, 2), end

    def forward(self, x):
        return self.end(self.head(self.body(x).tanh()), x)


def in_place(logits, x):
    return logits.clamp_(-1, 1)


def past_counting(logits, x):
    """Torch counts no change of this one."""
    logits.data.clamp_(-1, 1)
    return logits


def anew(logits, x):
    return logits.clamp(-1, 1)


def sometimes(logits, x):
    return logits * 2 if float(x.abs().max()) > 50 else logits


@pytest.mark.parametrize("end", [in_place, past_counting, anew, sometimes])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_what_follows_the_last_layer_is_seen_in_any_batch(end, structure):
    """In the first one, of small outputs, nothing does."""
    torch.manual_seed(0)
    model = Ended(end).eval()
    with torch.no_grad():
        model.head.weight *= 0.01
        model.head.bias.zero_()
    small, large, y = torch.randn(8, 3), torch.randn(8, 3) * 100, torch.zeros(8, 2)
    la = Laplace(model, "regression", "last_layer", structure, last_layer_name="head")
    la.fit([(small, y)])
    with torch.no_grad():
        model.head.weight *= 1000
    with pytest.raises(ValueError, match="is not the output of its last layer 'head'"):
        la.fit([(small * 1e-3, y), (large, y)])


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_last_layer_runs_once_for_every_batch(structure):
    """Once in the model, and not again to see that nothing follows it."""
    model, x, y = net(3, 4, 2), torch.randn(8, 3), torch.arange(8) % 2
    la = Laplace(model, "classification", "last_layer", structure)
    counts = [passes(model[-1], lambda n=n: la.fit([(x, y)] * n)) for n in (1, 2, 4)]
    assert counts[2] - counts[1] == 2


def test_outputs_that_a_model_overwrites_in_its_next_pass_are_kept():
    """As those that it writes into memory of its own."""

    def into_memory(logits, x):
        if not hasattr(into_memory, "kept"):
            into_memory.kept = torch.zeros_like(logits)
        return into_memory.kept.copy_(logits) if len(logits) == 8 else logits

    torch.manual_seed(0)
    model, x, y = Ended(into_memory).eval(), torch.randn(8, 3), torch.zeros(8, 2)
    la = Laplace(model, "regression", "last_layer", "diag", last_layer_name="head")
    la.fit([(x, y)])
    capture = la.backend.capture(x)
    before = capture.f.clone()
    la.backend.capture(x + 1)
    assert torch.equal(capture.f, before)
