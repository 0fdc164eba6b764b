"""Parameters by identity: rows from what the graph does with a parameter, against dense Jacobians by plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace import Laplace
from laplace.capture import capture as capturing

from . import naive


class Function(nn.Module):
    """A function of inputs with parameters and modules of its own."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x):
        return self.function(self, x)


N = 5
P = torch.randn
DISTANCES = torch.arange(3)[:, None] - torch.arange(3) + 2


def flat(layer, *shape):
    """A layer and a linear head over all that comes out of it."""
    with torch.no_grad():
        width = layer(torch.zeros(1, *shape)).numel()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2)), shape


def norm(layer):
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def recurrent(kind, **options):
    layer = kind(3, 4, **options)
    width = (layer.proj_size or 4) * (2 if layer.bidirectional else 1)
    first = layer.batch_first
    run = lambda m, x: m.head(m.layer(x)[0].mean(1) if first else m.layer(x.transpose(0, 1))[0][-1])  # noqa: E731
    return Function(run, layer=layer, head=nn.Linear(width, 2)), (3, 3)


def attention(**options):
    layer = nn.MultiheadAttention(4, 2, batch_first=options.pop("batch_first", True), **options)
    nn.init.normal_(layer.in_proj_bias)

    def run(m, x):
        q, k, v = x[..., :4], x[:, 1:, 4 : 4 + layer.kdim], x[:, 1:, 8 - layer.vdim :]
        if not layer.batch_first:
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        f = m.layer(q, k, v, need_weights=False)[0]
        return m.head(f.mean(1 if layer.batch_first else 0))

    return Function(run, layer=layer, head=nn.Linear(4, 2)), (3, 8)


def encoder():
    """A class token, learned positions and a layer scale around an encoder's layer."""

    def run(m, x):
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
        return m.head((m.layer(x) * m.scale)[:, 0])

    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    return Function(run, layer=layer, head=nn.Linear(4, 2), token=P(1, 1, 4), positions=P(1, 4, 4), scale=P(4)), (3, 4)


def windows():
    """A bias by relative position in attention over windows that are folded into the batch."""
    index = torch.randint(5, (3, 3))

    def run(m, x):
        x = x.reshape(-1, 3, 3)  # two windows of three
        scores = (x @ x.mT)[:, None] + m.table[index].permute(2, 0, 1)[None]
        return (scores.softmax(-1) @ x[:, None]).reshape(-1, 36) @ m.head

    return Function(run, table=P(5, 2), head=P(36, 2)), (6, 3)


CASES = {
    "instance norm": lambda: flat(norm(nn.InstanceNorm2d(3, affine=True)), 3, 4, 4),
    "instance norm 1d": lambda: flat(norm(nn.InstanceNorm1d(3, affine=True)), 3, 4),
    "prelu": lambda: flat(nn.Sequential(nn.Linear(3, 4), norm(nn.PReLU(4))), 3),
    "prelu of images": lambda: flat(norm(nn.PReLU(3)), 3, 2, 2),
    "prelu of one slope": lambda: flat(nn.PReLU(), 3),
    "transposed 1d": lambda: flat(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), 2, 4),
    "transposed 2d": lambda: flat(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2), 4, 3, 3),
    "transposed 2d with gaps": lambda: flat(nn.ConvTranspose2d(2, 3, 2, 3), 2, 3, 2),
    "transposed 3d": lambda: flat(nn.ConvTranspose3d(2, 3, 2, (1, 2, 2), bias=False), 2, 2, 2, 2),
    "rnn": lambda: recurrent(nn.RNN, nonlinearity="relu"),
    "gru": lambda: recurrent(nn.GRU, num_layers=2, batch_first=True, bidirectional=True),
    "lstm": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm with projections": lambda: recurrent(nn.LSTM, batch_first=True, proj_size=2),
    "attention over a memory": lambda: attention(),
    "attention, batch second": lambda: attention(batch_first=False),
    "attention of other widths": lambda: attention(kdim=3, vdim=2),
    "encoder": encoder,
    "windows": windows,
    "tied table": lambda: (
        Function(lambda m, x: F.linear(m.table(x).tanh().mean(1), m.table.weight), table=nn.Embedding(7, 3, padding_idx=2)),
        "tokens",
    ),
    "table of positions": lambda: (
        Function(
            lambda m, x: ((m.words(x) + m.t(torch.arange(4))).tanh() @ m.v).mean(1),
            words=nn.Embedding(7, 3), t=nn.Embedding(6, 3), v=P(3, 2),
        ),
        "tokens",
    ),
    "table of positions of one example": lambda: (
        Function(
            lambda m, x: (m.words(x) * m.t(torch.arange(4)[None])).tanh().mean(1) @ m.v,
            words=nn.Embedding(7, 3), t=nn.Embedding(6, 3, padding_idx=1), v=P(3, 2),
        ),
        "tokens",
    ),
    "table of distances": lambda: (
        Function(
            lambda m, x: (m.words(x).softmax(-1).mT @ m.words(x) + m.t(DISTANCES).permute(2, 0, 1)[0]).tanh().mean(1) @ m.v,
            words=nn.Embedding(7, 3), t=nn.Embedding(5, 2), v=P(3, 2),
        ),
        "tokens",
    ),
    "functional table": lambda: (Function(lambda m, x: F.embedding(x, m.w).tanh().mean(1) @ m.v, w=P(7, 3), v=P(3, 2)), "tokens"),
    "used twice": lambda: (Function(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w) @ m.v, w=P(3, 3), v=P(3, 2)), (3,)),
    "functional linear": lambda: (
        Function(lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.v), w=P(4, 3), b=P(4), v=P(2, 4)),
        (3,),
    ),
    "products over positions": lambda: (
        Function(lambda m, x: ((x @ m.w - m.b).tanh() @ m.v).mean(1), w=P(3, 4), b=P(4), v=P(4, 2)),
        (2, 3),
    ),
    "functional convolutions": lambda: (
        Function(
            lambda m, x: F.conv2d(F.conv2d(x, m.w, m.b, 2, 1).tanh(), m.u, groups=2).flatten(1) @ m.v,
            w=P(4, 2, 3, 3), b=P(4), u=P(4, 2, 2, 2), v=P(4, 2),
        ),
        (2, 4, 4),
    ),
    "functional batch norm": lambda: (
        Function(
            lambda m, x: F.batch_norm(x, x.new_tensor([0.1, -0.3]), x.new_tensor([2.0, 0.5]), m.w, m.b).relu().flatten(1) @ m.v,
            w=P(2), b=P(2), v=P(18, 2),
        ),
        (2, 3, 3),
    ),
    "functional group norm": lambda: (
        Function(lambda m, x: F.group_norm(x, 2, m.w, m.b).relu().flatten(1) @ m.v, w=P(4), b=P(4), v=P(24, 2)),
        (4, 2, 3),
    ),
    "functional group norm of vectors": lambda: (
        Function(lambda m, x: F.group_norm(x, 2, m.w, m.b).tanh() @ m.v, w=P(4), b=P(4), v=P(4, 2)),
        (4,),
    ),
    "functional layer norm": lambda: (
        Function(lambda m, x: F.layer_norm(x, (4,), m.w, m.b).tanh() @ m.v, w=P(4), b=P(4), v=P(4, 2)),
        (4,),
    ),
}  # fmt: skip


def made(name, dtype=torch.float64):
    torch.manual_seed(3)
    model, shape = CASES[name]()
    x = torch.randint(7, (N, 4)) if shape == "tokens" else torch.randn(N, *shape, dtype=dtype)
    return model.to(dtype).eval(), x


def targets(model, x):
    return torch.zeros_like(model(x)).detach()


@pytest.fixture
def pulled(monkeypatch):
    """Names of the parameters that were differentiated by copies or one example at a time."""
    names = set()
    plain = capturing.pullback
    monkeypatch.setattr(capturing, "pullback", lambda model, x, left: names.update(left) or plain(model, x, left))
    return names


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", CASES)
def test_curvature_is_that_of_dense_jacobians(name, structure, batch_size, pulled):
    model, x = made(name)
    js, y = naive.jacobians(model, x), targets(model, x)
    la = Laplace(model, "regression", "all", structure)
    la.fit([(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, N, batch_size)])
    truth = torch.einsum("ncp,ncq->pq", js, js)
    assert naive.relative_error(la.H, truth if structure == "full" else truth.diagonal()) < 1e-12
    assert not pulled


@pytest.mark.parametrize("name", CASES)
def test_single_precision_has_the_same_numbers(name, pulled):
    """As they are by default: fused layers of float32 show none of their products."""
    model, x = made(name)
    js, y = naive.jacobians(model, x), targets(model, x)
    la = Laplace(model.float(), "regression", "all", "full")
    la.fit([(x.float() if x.is_floating_point() else x, y.float())])
    assert naive.relative_error(la.H.double(), torch.einsum("ncp,ncq->pq", js, js)) < 1e-5
    assert not pulled


def fallen_back(function, shape, pulled, **parts):
    """Names of the parameters that were left to another way, after a comparison with dense Jacobians."""
    torch.manual_seed(3)
    model, x = Function(function, **parts).double(), torch.randn(N, *shape, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "full")
    la.fit([(x, targets(model, x))])
    js = naive.jacobians(model, x)
    assert naive.relative_error(la.H, torch.einsum("ncp,ncq->pq", js, js)) < 1e-12
    return pulled


def test_another_kind_of_use_leaves_the_parameter_to_automatic_differentiation(pulled):
    run = lambda m, x: (x @ m.w) * m.w.exp().sum() + m.b  # noqa: E731
    assert fallen_back(run, (3,), pulled, w=P(3, 2), b=P(2)) == {"w"}


def test_what_copies_of_parameters_can_do_is_not_done_one_example_at_a_time(pulled, monkeypatch):
    monkeypatch.setattr("laplace.capture.pullback._of_single_examples", None)  # calling it would be an error
    run = lambda m, x: (x @ m.w.exp()) * m.s.exp() + m.b  # noqa: E731
    assert fallen_back(run, (3,), pulled, w=P(3, 2), s=torch.tensor(0.3), b=P(2)) == {"w", "s"}


def test_rows_of_other_examples_are_noticed(pulled):
    """The layer sees the batch in reverse order: sums over the batch are right, rows are not."""
    run = lambda m, x: (x.flip(0) @ m.w).flip(0).tanh() + m.b  # noqa: E731
    assert fallen_back(run, (3,), pulled, w=P(3, 2), b=P(2)) == {"w"}


@pytest.mark.parametrize("positions", [2, N, 2 * N])
def test_positions_first_are_told_from_examples_first(positions, pulled):
    run = lambda m, x: ((x.transpose(0, 1) @ m.w + m.b).tanh() * m.s).mean(0) @ m.v  # noqa: E731
    assert not fallen_back(run, (positions, 3), pulled, w=P(3, 4), b=P(4), s=P(4), v=P(4, 2))


@pytest.mark.parametrize(("positions", "left"), [(N - 1, set()), (N, {"t.weight"}), (2 * N, set())])
def test_positions_that_are_as_many_as_examples_are_left_to_automatic_differentiation(positions, left, pulled):
    """Which of the two a table is looked up by, its indices do not say."""
    run = lambda m, x: (x * m.t(torch.arange(positions))).tanh().mean(1) @ m.v  # noqa: E731
    assert fallen_back(run, (positions, 3), pulled, t=nn.Embedding(11, 3), v=P(3, 2)) == left


def test_inputs_changed_in_place_are_left_to_automatic_differentiation(pulled):
    """What the product has kept is lost to everybody; the first factor here is multiplied by nothing that needs it."""

    def run(m, x):
        f = (x @ m.w).tanh() + m.b
        return f.add_(1) * m.s

    assert not fallen_back(run, (3,), pulled, w=P(3, 2), b=P(2), s=P(2))


def test_a_parameter_that_differs_between_examples_is_no_weight(pulled):
    """Looked up by a value of the input: rows of the table belong to single examples."""
    run = lambda m, x: m.t[(x[:, 0] > 0).long()] * x @ m.v  # noqa: E731
    assert fallen_back(run, (3,), pulled, t=P(2, 3), v=P(3, 2)) == {"t"}
