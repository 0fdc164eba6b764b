"""Kinds of fault that random models of further kinds have shown, each by the smallest model that has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from laplace import Laplace

from . import naive
from .test_uses import Function, P


def fit(model, batches, structure="diag", likelihood="regression"):
    la = Laplace(model, likelihood, "all", structure)
    la.fit([(x, torch.zeros(len(x), 2, dtype=x.dtype)) for x in batches])
    return la


def test_rows_of_positions_are_not_taken_for_those_of_examples_where_one_example_has_nearly_no_gradient():
    """A scalar times a table of four positions, of which the last alone has a gradient, in a batch of two examples.

    Its halves were taken for the examples, since weights of the examples came back within a hundredth.
    """
    distance = torch.arange(4.0).double()[:, None].expand(4, 4)
    run = lambda m, x: m.head((x @ x.mT - m.slope * distance)[:, -1])  # noqa: E731
    torch.manual_seed(0)
    model = Function(lambda m, x: x[:, 0, :1] * run(m, x), slope=P(()), head=nn.Linear(4, 2)).double()
    x = torch.randn(2, 4, 3).double()
    x[0, 0, 0] = 4e-3  # its share of the gradient
    js = naive.jacobians(model, x)
    truth = torch.einsum("ncp,ncp->p", js, js)
    assert naive.relative_error(fit(model, [x]).H[:1], truth[:1]) < 1e-12


def test_noise_on_few_values_is_found():
    """Two draws for three values are alike in an eighth of all cases; runs of a model that draws are many."""
    run = lambda m, x: m.head(F.dropout(x, 0.5))  # noqa: E731
    for seed in range(40):
        torch.manual_seed(seed)
        model, x = Function(run, head=nn.Linear(3, 2)).eval(), torch.zeros(3, 3)
        x[0, 0] = 1.0
        with pytest.raises(ValueError, match="random in evaluation mode"):
            fit(model, [x])


def test_a_model_that_draws_what_it_does_not_use_is_no_random_one():
    def run(m, x):
        torch.rand(1)
        return m.head(x)

    fit(Function(run, head=nn.Linear(3, 2)).eval(), [torch.randn(4, 3)])


def test_weak_coupling_is_found_under_autocast():
    """Bfloat16 has two digits; examples are compared in those of the model."""
    run = lambda m, x: m.head(x - 0.01 * x.mean(0))  # noqa: E731
    torch.manual_seed(1)
    model, x = Function(run, head=nn.Linear(3, 2)).eval(), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="depends on the others of its batch"):
        fit(model, [x])


def test_a_model_that_cannot_be_differentiated_is_refused_in_a_sentence():
    run = lambda m, x: m.head(m.inner(x).exp().relu_())  # noqa: E731
    model = Function(run, inner=nn.Linear(3, 3), head=nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match=r"^Neither .* autograd can differentiate .*inner.weight \(Linear\).*requires_grad=False"
    ):
        fit(model, [torch.randn(4, 3)])


def test_low_rank_under_autocast_has_the_eigenpairs_of_single_precision():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(20, 3)
    with torch.autocast("cpu", torch.bfloat16):
        low = fit(model, [x], "lowrank").H[1]
    assert naive.relative_error(low, fit(model, [x], "lowrank").H[1]) < 1e-5


def packed(m, x):
    lengths = 1 + (x[:, 1:, 0] > 0).sum(1)
    inner = m.inner(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
    return m.head(pad_packed_sequence(inner, batch_first=True, total_length=x.shape[1])[0].mean(1))


def test_coupling_that_one_example_in_the_middle_shows_alone_is_found():
    """The first ones and the last one are run by themselves; the others together, without these."""
    run = lambda m, x: m.head(torch.where(x[:, :1] < 0, x + x.amax(), x))  # noqa: E731
    torch.manual_seed(0)
    x = torch.rand(7, 3).double()
    x[4, 0], x[0, 1] = -1.0, 2.0
    model = Function(run, head=nn.Linear(3, 2)).double().eval()
    with pytest.raises(ValueError, match="depends on the others of its batch"):
        fit(model, [x])
    fit(model, [x[:4]])


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_packed_sequences_of_other_lengths_are_right_or_refused(structure):
    """Rows of packed steps are those of fewer and fewer examples; one example at a time, they are in order."""
    torch.manual_seed(3)
    model = Function(packed, inner=nn.LSTM(2, 3, batch_first=True, bidirectional=True), head=nn.Linear(6, 2)).double()
    x = torch.randn(6, 4, 2).double()
    js = naive.jacobians(model, x)
    truth = torch.einsum("ncp,ncq->pq", js, js)
    truth = truth if structure == "full" else truth.diagonal()
    assert naive.relative_error(fit(model, [x], structure).H, truth) < 1e-12
    one_by_one = fit(model, list(x.split(1)), structure)
    assert naive.relative_error(one_by_one.H, truth) < 1e-12
    with pytest.raises(ValueError, match="do not belong to them in order"):
        one_by_one(x)


def test_a_weight_of_a_function_that_the_first_batch_does_not_show_is_said():
    run = lambda m, x: m.head(F.linear(x, m.w, m.b).relu())  # noqa: E731
    torch.manual_seed(4)
    model = Function(run, w=P(3, 3).abs(), b=P(3), head=nn.Linear(3, 2)).double()
    x = torch.rand(4, 3).double()
    with pytest.warns(UserWarning, match="w .*no gradient in the first batch; diagonal block"):
        fit(model, [-100 * (1 + x), x], "kron")


def force(m, x):
    """The gradient of an energy."""
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        return torch.autograd.grad(m.net(z).sum(), z, create_graph=True)[0]


def beside_itself_detached(m, x):
    with torch.no_grad():
        gate = m.net(x)
    return F.linear(F.linear(x, m.net[0].weight).tanh(), m.net[2].weight) * gate


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("run", [force, beside_itself_detached])
def test_weights_that_count_otherwise_than_by_the_output_of_their_layer_are_no_dead_ones(run, structure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model = Function(lambda m, x: run(m, x) @ m.last, net=net, last=P(3 if run is force else 1, 2)).double().eval()
    x = torch.randn(5, 3).double()
    js = naive.jacobians(model, x)
    h = torch.einsum("ncp,ncq->pq", js, js)
    la = fit(model, [x[:3], x[3:]], structure)
    truth = {"full": h, "diag": h.diagonal()}.get(structure)
    if truth is None:  # some have factors, some a diagonal block
        truth = (la.H.to_matrix() + torch.eye(len(h))).double()
        assert naive.relative_error(la.functional_variance(js), naive.glm_covariance(js, truth)) < 1e-10
        assert {name for name, kind, _ in la.coverage if kind == "diag"} == {"net.2.bias", *DIAGONAL[run]}
    else:
        assert naive.relative_error(la.H, truth) < 1e-12


DIAGONAL = {force: {"net.0.weight"}, beside_itself_detached: {"net.0.bias"}}
