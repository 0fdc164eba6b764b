"""Which batches are asked whether the rows of uses hold, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.capture import capture as capturing
from laplace.capture import verify
from laplace.capture.uses import Uses, signature

from . import naive
from .test_uses import Function, N, P, targets


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
