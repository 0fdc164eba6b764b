"""Parameters by identity: rows from what the graph does with a parameter, against dense Jacobians by plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace import Laplace
from laplace.capture import capture as capturing
from laplace.capture import verify
from laplace.capture.uses import Uses, signature

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


# --- what is asked of every batch ----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """How often uses were checked in batches that are summed."""
    calls = []

    class Counted(Uses):
        def _keep_what_holds(self, *args):
            calls.append(1)
            return super()._keep_what_holds(*args)

    monkeypatch.setattr(capturing, "Uses", Counted)
    return calls


def fitted(run, batches, **parts):
    torch.manual_seed(3)
    model = Function(run, **parts).double()
    la = Laplace(model, "regression", "all", "full")
    la.fit([(x, targets(model, x)) for x in batches])
    js = naive.jacobians(model, torch.cat(batches))
    assert naive.relative_error(la.H, torch.einsum("ncp,ncq->pq", js, js)) < 1e-12
    return la


def inputs(n=N):
    return torch.randn(n, 3, dtype=torch.float64)


def test_a_graph_is_asked_once_and_one_of_other_shapes_again(asked):
    run = lambda m, x: (x * m.s).tanh() @ m.v  # noqa: E731
    fitted(run, [inputs(), inputs(), inputs(), inputs(3), inputs(3)], s=P(3), v=P(3, 2))
    assert len(asked) == 2


def test_a_graph_that_may_order_rows_by_their_values_is_asked_every_time(asked):
    def run(m, x):
        order = x[:, 0].argsort()
        return (x[order] * m.s)[order.argsort()].tanh() @ m.v

    fitted(run, [inputs(), inputs(), inputs()], s=P(3), v=P(3, 2))
    assert len(asked) == 3


def test_a_batch_without_gradients_proves_nothing(asked):
    run = lambda m, x: (x * m.s).relu() @ m.v  # noqa: E731
    fitted(run, [-inputs().abs(), inputs().abs(), inputs().abs()], s=torch.ones(3), v=P(3, 2))
    assert len(asked) == 2


def test_a_branch_that_turns_the_batch_round_is_asked(asked):
    """Which branch is taken depends on values: a use falls back, and a layer is refused."""

    def run(m, x):
        h = x * m.s if bool(x[0, 0] > 0) else (x.flip(0) * m.s).flip(0)
        return h.tanh() @ m.v

    first, second = inputs().abs(), -inputs().abs()
    fitted(run, [first, second, first, second], s=P(3), v=P(3, 2))
    assert len(asked) == 3

    run = lambda m, x: m.layer(x) if bool(x[0, 0] > 0) else m.layer(x.flip(0)).flip(0)  # noqa: E731
    model = Function(run, layer=nn.Linear(3, 2)).double()
    la = Laplace(model, "regression", "all", "full")
    with pytest.raises(ValueError, match="'layer'.*do not belong to them in order"):
        la.fit([(x, targets(model, x)) for x in (first, second)])


def test_branches_of_the_same_operations_with_other_parameters_or_dimensions_are_asked(asked):
    """Shapes and kinds of operations alone do not tell them apart."""
    run = lambda m, x: (x * (m.s if bool(x[0, 0] > 0) else m.t)).tanh() @ m.v  # noqa: E731
    batches = [inputs().abs(), -inputs().abs(), inputs().abs(), -inputs().abs()]
    fitted(run, batches, s=P(3), t=P(3), v=P(3, 2))
    assert len(asked) == 2
    one, two = (torch.ones(3, 3, requires_grad=True) for _ in range(2))
    cube = lambda leaf, *dims: signature(leaf[None].expand(3, 3, 3).transpose(*dims))  # noqa: E731
    assert len({cube(one, 0, 1), cube(one, 1, 2), cube(two, 0, 1)}) == 3 and cube(one, 0, 1) == cube(one, 0, 1)


# --- what is said of it --------------------------------------------------------------------------------------------------


def test_the_report_says_which_rows_follow_from_uses_and_which_from_autograd():
    run = lambda m, x: torch.einsum("ni,ij,jk->nk", m.b(m.p(x * m.s), x), m.w, m.w)  # noqa: E731
    torch.manual_seed(0)
    model = Function(run, p=nn.PReLU(), s=P(3), b=nn.Bilinear(3, 3, 2), w=P(2, 2)).double().eval()
    la = Laplace(model, "regression", "all", "diag")
    la.fit([(x := inputs(), targets(model, x))])
    why = {name: reason for name, _, reason in la.coverage}
    by_use = set(la.backend.capture(x)._uses.by_name)
    assert (
        {name for name in why if why[name].startswith("its uses in the graph: ")}
        == by_use
        == {"p.weight", "s", "b.bias"}
    )
    assert why["b.weight"] == "per-example autograd: Bilinear"


def test_sums_whose_reasons_have_other_words_are_added_up(monkeypatch):
    """As those of an earlier version, or where the first batch shows less."""
    run = lambda m, x: (x * m.s).tanh() @ m.v  # noqa: E731
    model = Function(run, s=P(3), v=P(3, 2)).double().eval()
    la = Laplace(model, "regression", "all", "diag")
    la.fit([(x := inputs(), targets(model, x))])
    before = la.H.clone()
    monkeypatch.setattr(verify, "_AUTOGRAD", "otherwise: ")
    la.fit([(x, targets(model, x))], override=False)
    torch.testing.assert_close(la.H, 2 * before)


# --- Kronecker factors: those of twins that are made of linear layers and cells ------------------------------------------


def factors(model, x, reduce=False):
    """Sums of Kronecker factors by name, and the names without any."""
    la = Laplace(model, "regression", "all", "kron", backend_kwargs={"kfac_approx": "reduce"} if reduce else None)
    la.fit([(x[:3], targets(model, x[:3])), (x[3:], targets(model, x[3:]))])
    return la.sums.tensors, {name for name, kind, _ in la.coverage if kind == "diag"}


def same_factors(ours, twin, pairs):
    for name, other in pairs.items():
        for side in "AB":
            assert naive.relative_error(ours[f"{name}/{side}"], twin[f"{other}/{side}"]) < 1e-12, (name, side)


def copied(module, values):
    module = module.double()
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)
    return module


FOLDED = {
    "1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "2d": (nn.ConvTranspose2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 0), dilation=(2, 1)), (2, 3, 2)),
    "gaps": (nn.ConvTranspose2d(2, 3, 2, 3, output_padding=2, bias=False), (2, 2, 2)),
}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("case", FOLDED)
def test_a_transposed_convolution_is_a_linear_layer_on_pixels_whose_patches_are_added(case, reduce):
    layer, shape = FOLDED[case]
    torch.manual_seed(1)
    x = torch.randn(N, *shape, dtype=torch.float64)
    model = flat(layer.float(), *shape)[0].double()
    size = layer(x.double()).shape[2:]
    two = lambda value: (1, *value) if len(value) == 1 else value  # noqa: E731
    geometry = {"kernel_size": two(layer.kernel_size), "dilation": two(layer.dilation), "stride": two(layer.stride)}
    pad = (0, *layer.padding) if len(layer.padding) == 1 else layer.padding

    def run(m, x):
        patches = m.pixels(x.flatten(2).mT).mT
        z = F.fold(patches, two(tuple(size)), padding=pad, **geometry)
        z = z if m.bias is None else z + m.bias.view(-1, 1, 1)
        return m.last(z.tanh().flatten(1))

    pixels = nn.Linear(2, layer.weight[0].numel(), bias=False)
    twin = Function(run, pixels=pixels, last=model[3])
    twin.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    twin = copied(twin, {"pixels.weight": layer.weight.detach().flatten(1).T})
    assert torch.allclose(model(x), twin(x), atol=1e-12)
    ours, diagonal = factors(model, x, reduce)
    theirs, _ = factors(twin, x, reduce)
    assert naive.relative_error(ours["0.weight/A"], theirs["pixels.weight/A"]) < 1e-12
    assert naive.relative_error(ours["0.weight/B"], theirs["pixels.weight/B"]) < 1e-12
    assert not diagonal


@pytest.mark.parametrize(("kind", "cell"), [(nn.RNN, nn.RNNCell), (nn.GRU, nn.GRUCell), (nn.LSTM, nn.LSTMCell)])
def test_a_recurrent_layer_is_its_cell_at_every_step(kind, cell):
    torch.manual_seed(2)
    x = torch.randn(N, 3, 3, dtype=torch.float64)
    layer = kind(3, 4, batch_first=True, bidirectional=True).double()
    model = Function(lambda m, x: m.head(m.layer(x)[0].mean(1)), layer=layer, head=nn.Linear(8, 2)).double()

    def steps(cell, x):
        state, found = None, []
        for t in range(x.shape[1]):
            state = cell(x[:, t], state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)

    run = lambda m, x: m.head(torch.cat([steps(m.on, x), steps(m.back, x.flip(1)).flip(1)], -1).mean(1))  # noqa: E731
    values = {key: getattr(layer, f"{key}_l0").detach() for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    back = {key: getattr(layer, f"{key}_l0_reverse").detach() for key in values}
    twin = Function(run, on=copied(cell(3, 4), values), back=copied(cell(3, 4), back), head=model.head)
    assert torch.allclose(model(x), twin(x), atol=1e-12)
    ours, diagonal = factors(model, x)
    pairs = {
        f"layer.{key}_l0{end}": f"{name}.{key}"
        for key in ("weight_ih", "weight_hh")
        for end, name in (("", "on"), ("_reverse", "back"))
    }
    same_factors(ours, factors(twin, x)[0], pairs)
    assert not diagonal


def attending(q, k, v):
    """Attention with two heads of two."""
    q, k, v = (z.unflatten(-1, (2, 2)).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("widths", [(4, 4), (3, 2)])
def test_attention_over_a_memory_is_a_linear_layer_for_each_of_its_inputs(widths):
    torch.manual_seed(4)
    model, shape = attention(**({} if widths == (4, 4) else {"kdim": 3, "vdim": 2}))
    model, x = model.double(), torch.randn(N, *shape, dtype=torch.float64)
    layer = model.layer
    stacked = layer.in_proj_weight is not None
    weights = (
        layer.in_proj_weight.split(4) if stacked else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    )
    lines = [
        copied(nn.Linear(w.shape[1], 4), {"weight": w, "bias": b})
        for w, b in zip(weights, layer.in_proj_bias.split(4), strict=True)
    ]

    def run(m, x):
        q, k, v = m.q(x[..., :4]), m.k(x[:, 1:, 4 : 4 + widths[0]]), m.v(x[:, 1:, 8 - widths[1] :])
        return m.head(m.out(attending(q, k, v)).mean(1))

    twin = Function(run, q=lines[0], k=lines[1], v=lines[2], out=layer.out_proj, head=model.head)
    assert torch.allclose(model(x), twin(x), atol=1e-12)
    ours, diagonal = factors(model, x)
    theirs = factors(twin, x)[0]
    same_factors(ours, theirs, {"layer.out_proj.weight": "out.weight", "head.weight": "head.weight"})
    if not stacked:
        same_factors(ours, theirs, {f"layer.{key}_proj_weight": f"{key}.weight" for key in "qkv"})
        assert diagonal == {"layer.in_proj_bias"}
        return
    assert not diagonal
    truth = torch.block_diag(*(theirs[f"{key}.weight/B"] for key in "qkv"))
    assert naive.relative_error(ours["layer.in_proj_weight/B"], truth) < 1e-12
    mean = (3 * theirs["q.weight/A"] + 2 * theirs["k.weight/A"] + 2 * theirs["v.weight/A"]) / 7  # of all positions
    assert naive.relative_error(ours["layer.in_proj_weight/A"], mean) < 1e-12


def test_functions_of_weights_have_the_factors_of_linear_layers():
    torch.manual_seed(5)
    x = torch.randn(N, 2, 3, dtype=torch.float64)
    run = lambda m, x: (F.linear(x, m.w, m.b).tanh() @ m.v).mean(1)  # noqa: E731
    model = Function(run, w=P(4, 3), b=P(4), v=P(4, 2)).double()
    twin = Function(lambda m, x: m.two(m.one(x).tanh()).mean(1), one=nn.Linear(3, 4), two=nn.Linear(4, 2, bias=False))
    twin = copied(twin, {"one.weight": model.w, "one.bias": model.b, "two.weight": model.v.T})
    ours, diagonal = factors(model, x)
    theirs, _ = factors(twin, x)
    same_factors(ours, theirs, {"w": "one.weight", "v": "two.weight"})
    assert naive.relative_error(ours["b/B"], theirs["one.weight/B"]) < 1e-12
    assert not diagonal


def test_a_weight_that_is_used_otherwise_in_a_later_batch_is_refused():
    def run(m, x):
        return x @ m.w if len(x) > 2 else (x[:, :, None] * m.w).sum(1)

    model, x = Function(run, w=P(3, 2)).double(), torch.randn(N, 3, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "kron")
    with pytest.raises(ValueError, match=r"In this batch, the model uses \['w'\] otherwise than in its first one"):
        la.fit([(x[:3], targets(model, x[:3])), (x[3:], targets(model, x[3:]))])


def half_dead(m, x):
    """A layer whose weight is used again outside of it; the first examples have no gradient at all."""
    h = m.layer(x.relu())
    return F.linear(h.tanh(), m.layer.weight.T).relu() @ m.head


@pytest.mark.parametrize("structure", ["full", "diag", "ekfac"])
def test_uses_outside_of_a_module_are_seen_where_the_first_examples_prove_nothing(structure):
    """Gradients of the first batch are zero, so that the layer's calls alone would seem to give them."""
    torch.manual_seed(0)
    model = Function(half_dead, layer=nn.Linear(3, 4, bias=False), head=P(3, 2)).double()
    x = torch.randn(N, 3, dtype=torch.float64).abs()
    x[0] = -1
    la = Laplace(model, "regression", "all", structure)
    la.fit([(x[i : i + 1], torch.zeros(1, 2, dtype=torch.float64)) for i in range(N)])
    js = naive.jacobians(model, x)
    truth = torch.einsum("ncp,ncq->pq", js, js)
    assert float(js[0].norm()) == 0 < float(truth.norm())
    if structure == "ekfac":
        assert {name for name, kind, _ in la.coverage if kind == "diag"} >= {"layer.weight"}
    else:
        assert naive.relative_error(la.H, truth if structure == "full" else truth.diagonal()) < 1e-12


def test_a_use_outside_of_a_module_in_a_later_batch_is_refused():
    run = lambda m, x: m.layer(x) if len(x) > 2 else m.layer(x) + 0 * m.layer.weight.sum()  # noqa: E731
    model, x = Function(run, layer=nn.Linear(3, 2)).double(), torch.randn(N, 3, dtype=torch.float64)
    la = Laplace(model, "regression", "all", "diag")
    with pytest.raises(ValueError, match=r"the model uses \['layer.weight'\] otherwise than in its first one"):
        la.fit([(x[:3], targets(model, x[:3])), (x[3:], targets(model, x[3:]))])
