"""Products by oneDNN, beside those of float64: for all layouts of memory, in networks, and in sums."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace.capture.calls import nodes
from laplace.linalg import gram, matmul

LAYOUTS = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.T.contiguous().T,
    "rows of more columns": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "columns of more rows": lambda t: torch.cat((t, t)).T.contiguous().T[: len(t)],
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda t: t[:1].expand_as(t),
}


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def fast(request, monkeypatch):
    """Either way of multiplying, whatever the processor prefers."""
    assert matmul.is_possible()
    monkeypatch.setattr(matmul, "is_faster", lambda: request.param)
    monkeypatch.setattr(matmul, "_fewest", lambda: 1 << 21)
    return request.param


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max())


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_products_of_every_layout(left, right, fast):
    torch.manual_seed(0)  # of one row for all, terms may cancel to nearly nothing, of which few digits are left
    a, b = LAYOUTS[left](torch.randn(100, 160)), LAYOUTS[right](torch.randn(220, 160))
    truth = a.double() @ b.double().T
    assert error(matmul.times_transposed(a, b), truth) < 2e-6
    assert error(matmul.product(a, b.T), truth) < 2e-6
    total = torch.ones(100, 220)
    assert matmul.add_times_transposed_(total, a, b) is total
    assert error(total, truth + 1) < 2e-6


def test_values_of_several_dimensions(fast):
    a, b = torch.randn(4, 30, 160), torch.randn(160, 220)
    for values in (a, a.transpose(0, 1), a[:, ::2]):
        found = matmul.product(values, b)
        assert found.shape == (*values.shape[:-1], 220)
        assert error(found, values.double() @ b.double()) < 2e-6


def test_what_is_differentiated_has_a_derivative(fast):
    a, b = torch.randn(100, 160, requires_grad=True), torch.randn(220, 160)
    (found,) = torch.autograd.grad(matmul.times_transposed(a, b).sin().sum(), a)
    wide = a.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad((wide @ b.double().T).sin().sum(), wide)
    assert error(found, truth) < 1e-5


@pytest.mark.parametrize("sizes", [(3, 200, 80, 150), (4, 5, 6, 7), (0, 200, 80, 150)], ids=["large", "small", "none"])
def test_sums_of_squared_products(sizes, fast):
    n, k, a, b = sizes
    left, right = torch.randn(n, a, k).mT, torch.randn(n, k, b)
    truth = (left.double().mT @ right.double()).square().sum(0)
    assert matmul.sum_of_squared_products(left, right).shape == (a, b)
    assert n == 0 or error(matmul.sum_of_squared_products(left, right), truth) < 2e-6


class Seen(TorchDispatchMode):
    """The operations that come to be."""

    def __init__(self):
        super().__init__()
        self.products: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.products.append(args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_dnn_is_given_matrices_without_gaps(layout, monkeypatch):
    """Of others it makes products a thousand times more slowly, which no number shows."""
    monkeypatch.setattr(matmul, "is_faster", lambda: True)
    monkeypatch.setattr(matmul, "_fewest", lambda: 1 << 21)
    matrix = LAYOUTS[layout](torch.randn(200, 160))
    with Seen() as seen:
        matmul.times_transposed(matrix, matrix)
        gram.add_gram_(torch.zeros(200, 200, dtype=torch.float64), [torch.randn(300, 256)[:, 20:220]])
    assert len(seen.products) > 1
    assert all(m.is_contiguous() or m.T.is_contiguous() for pair in seen.products for m in pair)


def test_what_is_small_or_of_another_type_is_torchs_own(monkeypatch):
    monkeypatch.setattr(matmul, "is_faster", lambda: True)
    monkeypatch.setattr(matmul, "_fewest", lambda: 1 << 21)
    with Seen() as seen:
        matmul.times_transposed(torch.randn(8, 8), torch.randn(8, 8))
        for dtype in (torch.float64, torch.bfloat16, torch.complex64):
            matmul.times_transposed(torch.randn(200, 200).to(dtype), torch.randn(200, 200).to(dtype))
        matmul.times_transposed(torch.randn(0, 200), torch.randn(200, 200))
        assert matmul.turned(torch.randn(3, 2, dtype=torch.float64), 1 << 21).stride() == (1, 2)
    assert seen.products == []


class Network(nn.Module):
    """Linear layers with and without a bias, over positions, and a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(160, 240), nn.Linear(240, 200, bias=False)
        self.own = nn.Parameter(torch.randn(200, 130) / 14)
        self.scaled = nn.Parameter(torch.randn(130, 130) / 11)

    def forward(self, x):
        h = torch.tanh(self.second(torch.tanh(self.first(x)))) @ self.own
        h = h.flatten(0, -2) if h.ndim > 2 else h
        return torch.addmm(h, h, self.scaled, beta=0.5, alpha=2.0)


@pytest.mark.parametrize("shape", [(100, 160), (20, 7, 160)])
def test_a_network_has_its_outputs_gradients_and_graph(shape, fast):
    torch.manual_seed(0)
    model, x = Network(), torch.randn(shape)
    reference = Network().double()
    reference.load_state_dict(model.state_dict())
    found = []
    for net, inputs in ((reference, x.double()), (model, x)):
        with Seen() as seen, matmul.faster_products(net.parameters()):
            f = net(inputs)
            gradients = torch.autograd.grad(f.sin().sum(), list(net.parameters()))
        found.append((f, gradients, sorted(type(node).__name__ for node in nodes(f))))
    (f, gradients, names), (g, others, same) = found
    assert bool(seen.products) == fast
    assert error(g, f) < 4e-6 and same == names
    assert all(error(one, other) < 4e-6 for one, other in zip(others, gradients, strict=True))


def test_a_network_of_small_or_other_weights_is_left_alone(monkeypatch):
    monkeypatch.setattr(matmul, "is_faster", lambda: True)
    monkeypatch.setattr(matmul, "_fewest", lambda: 1 << 21)
    for weights in ([torch.randn(20, 20)], [torch.randn(200, 200).double()], [torch.randn(10**5)], []):
        assert isinstance(matmul.faster_products(weights), contextlib.nullcontext)


@pytest.mark.parametrize("width", [200, 500])
def test_sums_of_rows_of_all_sizes(width, fast):
    """Large rows first: added one by one in float32, the small ones vanish."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1500, width, generator=generator) * torch.logspace(0, -4, 1500)[:, None]
    total = torch.zeros(width, width, dtype=torch.float64)
    gram.add_gram_(total, rows.split(400))
    gram.mirror_(total)
    truth = rows.double().T @ rows.double()
    assert float((total - truth).norm() / truth.norm()) < 5e-7
    small = rows[750:]
    rest = total - rows[:750].double().T @ rows[:750].double()
    wanted = small.double().T @ small.double()
    assert float((rest - wanted).norm() / truth.norm()) < 5e-7
    other = torch.randn(1500, 300, generator=generator)
    product = torch.zeros(width, 300, dtype=torch.float64)
    gram.add_product_(product, rows, other)
    assert error(product, rows.double().T @ other.double()) < 2e-6
