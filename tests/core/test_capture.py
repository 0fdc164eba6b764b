"""What a capture has to notice: layers that are more than their weight, calls without gradient, inputs that change."""

from __future__ import annotations

import warnings

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
        rows = [torch.autograd.grad(v, params, retain_graph=True, allow_unused=True, materialize_grads=True) for v in f]
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


@pytest.mark.parametrize(("size", "scale"), [(1.0, 20), (1e-8, 20), (1.0, 1.0003)])
def test_a_last_layer_that_is_scaled_afterwards(size, scale):
    model, (x, y) = Net(lambda m, x: scale * m.head(torch.tanh(m.body(x)))), data()
    with torch.no_grad():
        for p in model.head.parameters():
            p.mul_(size)
    la = Laplace(model, "classification", "last_layer", "full")
    with pytest.raises(ValueError, match="not the output of its last layer 'head'"):
        la.fit(batches(x, y))


def test_a_last_layer_that_is_scaled_in_later_batches_alone():
    def forward(m, x):
        out = m.head(torch.tanh(m.body(x)))
        return torch.where(x[:, :1] == 0, out, 20 * out)

    model, (x, y) = Net(forward), data()
    x[:3, 0] = 0
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


def relative(value, truth):
    return float((value - truth).norm() / truth.norm())


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.flatten(1).norm(dim=1)[:, None, None, None], self.bias)


@pytest.mark.parametrize("blank", [slice(7, 8), slice(0, 8), slice(0, 7)])
def test_blank_examples_prove_nothing(blank):
    """An eighth image of zeros made a standardised convolution a plain one: H 28 % off."""
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x, y = torch.randn(12, 1, 3, 3, dtype=torch.float64), torch.randint(2, (12,))
    x[blank] = 0
    la = Laplace(model, "classification", "all", "full")
    la.fit(batches(x, y, 8))
    assert relative(la.H, dense(model, x, [n for n, _ in model.named_parameters()])) < 1e-10


@pytest.mark.parametrize("context", [False, True])
def test_a_diagonal_block_of_a_linear_layer_is_said(context):
    model, (x, y) = Net(lambda m, x: m.head(torch.tanh(m.body(x))) + m.body.weight.sum()), data()
    with pytest.warns(UserWarning, match=r"diagonal block, for body.weight \("):
        Laplace(model, "classification", "all", "kron").fit(batches(x, y))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast_keeps_kronecker_factors(where):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "inside"):
            return m.head(torch.tanh(m.body(x))).float()

    torch.manual_seed(0)
    model, (x, y) = Net(forward).float(), data()
    exact = Laplace(Net().float(), "classification", "all", "kron")
    exact.fit(batches(x.float(), y))
    la = Laplace(model, "classification", "all", "kron")
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        la.fit(batches(x.float(), y))
    assert all(kind == "kron" for _, kind, _ in la.coverage)
    assert relative(la.H_facs.to_matrix(), exact.H_facs.to_matrix()) < 0.03
    assert la.H_facs.to_matrix().dtype == torch.float32


class Picks(nn.Module):
    """Maps the positions that are not padding; others stay zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(2, 3), nn.Linear(9, 2)
        self.double()

    def forward(self, x):
        kept = x[..., 0] != 0
        if kept.all():
            return self.head(torch.tanh(self.inner(x.flatten(0, 1))).unflatten(0, x.shape[:2]).flatten(1))
        out = x.new_zeros(*x.shape[:2], 3)
        out[kept] = torch.tanh(self.inner(x[kept]))
        return self.head(out.flatten(1))


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("padded", ["first batch", "later batch"])
def test_positions_that_are_picked_by_a_mask(padded, structure):
    """They pass a check of an unpadded batch; H was 14 % off on a padded one."""
    model = Picks()
    x, y = torch.randn(8, 3, 2, dtype=torch.float64), torch.randint(2, (8,))
    x[1 if padded == "first batch" else 5, 1:] = 0
    x[2 if padded == "first batch" else 6, 2] = 0
    la = Laplace(model, "classification", "all", structure)
    if padded == "later batch":
        with pytest.raises(ValueError, match="layer 'inner'.*batch_size=1"):
            la.fit(batches(x, y, 4))
        return
    la.fit(batches(x, y, 4))
    if structure == "full":
        assert relative(la.H, dense(model, x, [n for n, _ in model.named_parameters()])) < 1e-10
    if structure == "diag":
        assert relative(la.H, dense(model, x, [n for n, _ in model.named_parameters()]).diagonal()) < 1e-10


def test_prelu_is_wrong_under_vmap_and_right_here():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)).double()
    x, y = data()
    la = Laplace(model, "classification", "all", "full")
    la.fit(batches(x, y, 2))
    assert relative(la.H, dense(model, x, [n for n, _ in model.named_parameters()])) < 1e-10


def test_what_cannot_be_differentiated_is_named():
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("no gradient here")

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return NoGradient.apply(self.scale * x)

    x, y = data(width=2)
    with pytest.raises(ValueError, match=r"0.scale \(Scale\).*requires_grad=False"):
        Laplace(nn.Sequential(Scale()), "classification", "all", "full").fit(batches(x.float(), y))


MODELS = {
    "dropout": (lambda m, x: m.head(torch.nn.functional.dropout(m.body(x))), "random.*the model \\(Net\\)"),
    "noise": (lambda m, x: m.head(m.body(x) + 1e-3 * torch.randn(len(x), 4).to(x)), "random.*the model \\(Net\\)"),
    "centred": (
        lambda m, x: m.head(torch.tanh(m.body(x - x.mean(0)))),
        "In the model \\(Net\\).*the others of its batch",
    ),
    "tuple": (lambda m, x: (m.head(m.body(x)), None), "output is a tuple.*output.logits"),
    "dict": (lambda m, x: {"logits": m.head(m.body(x))}, "output is a dict.*output.logits"),
    "one value": (lambda m, x: m.head(m.body(x))[:, 0], r"shape \(3,\), but has to be \(batch, outputs\).*unsqueeze"),
    "fails": (lambda m, x: m.head(x), r"fails in module 'head' \(Linear\)"),
    "wants a tensor": (
        lambda m, x: m.head({"x": x}),
        r"first batch fails in module 'head' \(Linear\): TypeError: linear\(\)",
    ),
    "wants a mapping": (lambda m, x: m.head({"x": x}["y"]), r"first batch fails in the model \(Net\): KeyError: 'y'"),
}


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("blank", [False, True])
def test_models_without_a_curvature_are_named(name, subset, blank):
    forward, message = MODELS[name]
    model, (x, y) = Net(forward), data()
    x = torch.zeros_like(x) if blank else x
    with pytest.raises((TypeError, ValueError), match=message):
        Laplace(model, "classification", subset, "full").fit(batches(x, y))


def test_batch_statistics_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)).double()
    x, y = data()
    with pytest.raises(ValueError, match=r"one example by itself fails in module '1' \(BatchNorm1d\)"):
        Laplace(model, "classification", "all", "kron").fit(batches(x, y))


def test_inputs_in_a_tuple_are_refused():
    model, (x, y) = Net(lambda m, x: m.head(m.body(x[0]))), data()
    with pytest.raises(TypeError, match="inputs are a tuple.*dictionary"):
        Laplace(model, "classification", "all", "full").fit([((x, x), y)])


def test_complex_parameters_are_named():
    model = Net()
    model.weight = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"\['weight'\] are complex"):
        Laplace(model, "classification")


@pytest.mark.parametrize(("shape", "both"), [((3, 3), True), ((2, 3), False), ((2, 2, 2), True), ((2, 3, 2), False)])
def test_logits_that_can_be_read_in_two_ways_are_said(shape, both):
    model = nn.Sequential(nn.Linear(2, torch.Size(shape).numel()), nn.Unflatten(1, shape)).double()
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randint(2, (4, *shape[:-1]))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Laplace(model, "classification", "all", "diag").fit(batches(x, y))
    assert any("with the classes last" in str(warning.message) for warning in found) is both


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_a_layer_that_does_not_run_in_a_later_batch(structure):
    def forward(m, x):
        chosen = x[:, :1] > 0
        h = x @ torch.ones(3, 4).to(x)
        return m.head(torch.tanh(h + chosen * m.body(x) if chosen.any() else h))

    model, (x, y) = Net(forward), data()
    x[:, 0] = torch.tensor([1.0, 2.0, -1.0, -1.0, -2.0, -3.0])
    la = Laplace(model, "classification", "all", structure)
    la.fit(batches(x, y))
    truth = dense(model, x, [n for n, _ in model.named_parameters()])
    if structure != "kron":
        assert relative(la.H, truth if structure == "full" else truth.diagonal()) < 1e-10
    la(x[3:])


def test_a_fit_of_a_last_layer_keeps_no_graph_of_what_is_before_it():
    """Of a large model that is the memory of all its activations; one example is asked for gradients."""

    class Watched(nn.Linear):
        def forward(self, x):
            assert not torch.is_grad_enabled() or len(x) == 1
            return super().forward(x)

    la = Laplace(nn.Sequential(Watched(3, 4), nn.Linear(4, 2)), "classification", "last_layer", "kron")
    la.fit([(torch.randn(6, 3), torch.arange(6) % 2)])
    assert la(torch.randn(2, 3)).shape == (2, 2)
