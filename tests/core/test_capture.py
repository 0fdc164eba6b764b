"""What a capture has to notice: layers that are more than their weight, calls without gradient, inputs that change."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from laplace import Laplace

from . import naive


def data(n=6, width=3, classes=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def batches(x, y, size=3):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(y), size)]


def dense(model, x, names):
    """Sum of ``Jᵀ Λ J`` over the examples, by plain autograd."""
    params = [p for n, p in model.named_parameters() if n in names]
    total = 0.0
    for i in range(len(x)):
        f = model(x[i : i + 1])[0]
        rows = [torch.autograd.grad(value, params, retain_graph=True) for value in f]
        j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        total = total + j.T @ naive.output_hessian(f.detach(), "classification") @ j
    return total


class Net(nn.Module):
    def __init__(self, forward=None):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.run = nn.Linear(3, 4), nn.Linear(4, 2), forward
        self.double()

    def forward(self, x):
        return self.run(self, x) if self.run else self.head(torch.tanh(self.body(x)))


WRAPPERS = {
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    "spectral_norm_old": lambda layer: nn.utils.spectral_norm(layer),
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda m, args: (0.5 * args[0],)),
    "hook": lambda layer: layer.register_forward_hook(lambda m, args, out: 1.5 * out),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_last_layer_that_is_more_than_its_weight(wrapper):
    model, (x, y) = Net(), data()
    WRAPPERS[wrapper](model.head)
    model.eval()
    kept = {name: set(module.__dict__) for name, module in model.named_modules()}
    la = Laplace(model, "classification", "last_layer", "full")
    la.fit(batches(x, y))
    la(x, pred_type="nn", link_approx="mc", n_samples=2)
    names = [n for n, p in model.named_parameters() if n.startswith("head.")]
    truth = dense(model, x, names)
    assert float((la.H - truth).norm() / truth.norm()) < 1e-10
    assert kept == {name: set(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_a_last_layer_that_is_scaled_afterwards(size):
    model, (x, y) = Net(lambda m, x: 20 * m.head(torch.tanh(m.body(x)))), data()
    with torch.no_grad():
        for p in model.head.parameters():
            p.mul_(size)
    la = Laplace(model, "classification", "last_layer", "full")
    with pytest.raises(ValueError, match="not the output of its last layer 'head'"):
        la.fit(batches(x, y))


def test_a_last_layer_that_is_scaled_in_later_batches_alone():
    def forward(m, x):
        out = m.head(torch.tanh(m.body(x)))
        return out if float(x[0, 0]) == 0 else 20 * out

    model, (x, y) = Net(forward), data()
    x[0] = 0
    la = Laplace(model, "classification", "last_layer", "full")
    with pytest.raises(ValueError, match="not the output of its last layer 'head'"):
        la.fit(batches(x, y))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradient_is_left_out(context):
    def forward(m, x):
        with context():
            m.body(x.detach())
        scale = 1 + m.body(x).detach().square().mean(1, keepdim=True)
        return m.head(torch.tanh(m.body(x)) / scale)

    model, (x, y) = Net(forward), data()
    la = Laplace(model, "classification", "all", "full")
    la.fit(batches(x, y))
    truth = dense(model, x, [n for n, _ in model.named_parameters()])
    assert float((la.H - truth).norm() / truth.norm()) < 1e-10


def test_an_input_that_changes_after_its_layer_has_run_is_refused():
    def forward(m, x):
        h = x * 1
        out = m.head(torch.tanh(m.body(h)))
        h.detach().mul_(0)
        return out

    model, (x, y) = Net(forward), data()
    with pytest.raises((ValueError, RuntimeError), match="in place"):
        Laplace(model, "classification", "all", "full").fit(batches(x, y))


def test_a_forward_pass_that_changes_its_input_in_place():
    """H was 28 % off, from the passes that saw an input that an earlier one had changed."""

    def forward(m, x):
        return m.head(torch.tanh(m.body(x.mul_(0.5))))

    model, (x, y) = Net(forward), data()
    before = x.clone()
    la = Laplace(model, "classification", "all", "full")
    la.fit(batches(x, y))
    la(x)
    assert torch.equal(x, before)
    truth = dense(Net(lambda m, x: forward(m, 1 * x)), x, [n for n, _ in model.named_parameters()])
    assert float((la.H - truth).norm() / truth.norm()) < 1e-10


def test_an_embedding_whose_gradient_is_scaled_by_frequency():
    """Its gradient is no derivative; curvature is that of its output."""
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(4, 3, scale_grad_by_freq=scaled)
        model = nn.Sequential(table, nn.Flatten(), nn.Linear(6, 2)).double()
        la = Laplace(model, "classification", "all", "kron")
        la.fit([(torch.tensor([[0, 0], [1, 2], [3, 3]]), torch.tensor([0, 1, 1]))])
        assert table.scale_grad_by_freq is scaled
        results.append(la.H_facs.to_matrix())
    assert torch.equal(*results)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_predictions_in_inference_mode(subset, structure):
    model, (x, y) = Net(), data()
    la = Laplace(model, "classification", subset, structure)
    la.fit(batches(x, y))
    with torch.inference_mode():
        inside = la(x.clone())
    assert torch.equal(inside, la(x))
