"""Layers beyond Linear and Conv2d: rows from captured inputs and output gradients, against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from laplace import Laplace
from laplace.capture import rules as layers
from laplace.predictive import glm_distribution

from . import naive
from .models import Case, Pool, loader

STRUCTURES = ["full", "kron", "diag"]


class Sentence(nn.Module):
    """Embedding with a padding index, transposed layers on every token, RMS norm."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=padding_idx)
        self.up, self.norm, self.down = Conv1D(4, 3), nn.RMSNorm(4), Conv1D(3, 4)
        nn.init.normal_(self.up.bias)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(self.table(x)))).mean(1))


def trained_norm(norm):
    """Affine parameters and running statistics that are not trivial."""
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    if hasattr(norm, "running_mean"):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def image(*modules):
    return nn.Sequential(nn.Conv2d(1, 4, 2), *modules, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def flat(conv, width):
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3))


CASES = {
    "transposed": Case(lambda: nn.Sequential(Conv1D(4, 3), nn.Tanh(), Conv1D(3, 4))),
    "transposed-tokens": Case(lambda: nn.Sequential(Conv1D(4, 3), nn.Tanh(), Pool(), Conv1D(3, 4)), (2, 3)),
    "conv1d": Case(lambda: flat(nn.Conv1d(2, 3, 2, stride=2, padding=1), 9), (2, 4)),
    "conv1d-same": Case(lambda: flat(nn.Conv1d(2, 3, 2, padding="same", dilation=2), 12), (2, 4)),
    "conv1d-circular": Case(lambda: flat(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), 8), (2, 4)),
    "conv3d": Case(lambda: flat(nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 2, 1), padding=(0, 0, 1)), 24), (2, 3, 3, 2)),
    "grouped": Case(lambda: flat(nn.Conv2d(4, 6, 2, groups=2), 24), (4, 3, 3), fallback=("0.weight",)),
    "depthwise": Case(lambda: flat(nn.Conv1d(3, 3, 2, groups=3, bias=False), 9), (3, 4), fallback=("0.weight",)),
    "layer-norm": Case(lambda: image(trained_norm(nn.LayerNorm((2, 2)))), (1, 3, 3), fallback=("1.weight", "1.bias")),
    "group-norm": Case(lambda: image(trained_norm(nn.GroupNorm(2, 4))), (1, 3, 3), fallback=("1.weight", "1.bias")),
    "batch-norm": Case(lambda: image(trained_norm(nn.BatchNorm2d(4))), (1, 3, 3), fallback=("1.weight", "1.bias")),
    "sentence": Case(Sentence, (4,), fallback=("table.weight", "norm.weight"), vocabulary=6),
    "padding": Case(lambda: Sentence(padding_idx=2), (4,), fallback=("table.weight", "norm.weight"), vocabulary=6),
}  # fmt: skip
FACTORED = ["transposed", "transposed-tokens", "conv1d", "conv1d-same", "conv1d-circular", "conv3d"]


def fit(name, structure, batch_size=2):
    case = CASES[name]
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, "all", structure, prior_precision=0.6)
    la.fit(loader(x, y, batch_size))
    return la, model, x, y, case


@pytest.mark.parametrize("name", CASES)
def test_covered_natively(name):
    la, _, _, _, case = fit(name, "kron")
    assert all(block.layer is not None for block in la.sums_spec().blocks)
    assert tuple(row[0] for row in la.coverage if row[1] == "diag") == case.fallback


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", CASES)
def test_dense_and_diagonal_curvature(name, structure, batch_size):
    la, model, x, y, case = fit(name, structure, batch_size)
    truth = naive.full(model, x, y, case.likelihood, "ggn")
    assert naive.relative_error(la.H, truth if structure == "full" else truth.diagonal()) < 1e-10
    js = la.backend.jacobians(x)[0]
    assert naive.relative_error(js, naive.jacobians(model, x)) < 1e-10


def by_position(module, values):
    """``(1, channels, ...)`` of a convolution, or ``(1, ..., channels)``, as ``(positions, channels)``."""
    values = values[0]
    return values.flatten(1).T if isinstance(module, (nn.Conv1d, nn.Conv3d)) else values.reshape(-1, values.shape[-1])


def rows_of_inputs(module, z, x):
    """The inputs that multiply the flattened weight, by linearity: one derivative of ``z`` per position."""
    if isinstance(module, (Conv1D, nn.Linear)):
        return x[0].reshape(-1, x.shape[-1])
    channel = z[0, 0].flatten()  # of one output channel; its derivative in that channel's weights is the patch
    return torch.stack([torch.autograd.grad(v, module.weight, retain_graph=True)[0][0].flatten() for v in channel])


def dense_kron(model, x):
    """``⊕ B ⊗ A`` (``A ⊗ B`` where the weight is transposed), by loops over examples, positions and outputs."""
    blocks = []
    for module in [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv3d))]:
        left = right = 0.0
        for example in x:
            seen = []
            handle = module.register_forward_hook(lambda m, args, output, seen=seen: seen.append((args[0], output)))
            f = model(example[None])
            handle.remove()
            a, z = seen[0]
            grads = [by_position(module, torch.autograd.grad(v, z, retain_graph=True)[0]) for v in f[0]]
            g = torch.stack(grads)  # outputs, positions, out
            hessian = naive.output_hessian(f[0].detach(), "classification")
            left = left + torch.einsum("cro,cd,drp->op", g, hessian, g)
            inputs = rows_of_inputs(module, z, a).detach()
            right = right + inputs.T @ inputs / len(inputs) / len(x)
        left, right = left.contiguous(), right.contiguous()
        blocks.append(torch.kron(right, left) if isinstance(module, Conv1D) else torch.kron(left, right))
        if module.bias is not None:
            blocks.append(left)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("name", FACTORED)
def test_kronecker_factors_are_in_the_order_of_the_weight(name):
    la, model, x, _, _ = fit(name, "kron")
    truth = dense_kron(model, x)
    assert naive.relative_error(la.H_facs.to_matrix(), truth) < 1e-10
    assert naive.relative_error(la.H.to_matrix(), truth) < 1e-10
    assert naive.relative_error(la.H_facs.diag(), truth.diagonal()) < 1e-10
    precision = truth + 0.6 * torch.eye(len(truth), dtype=torch.float64)
    assert float(la.log_det_posterior_precision) == pytest.approx(float(torch.logdet(precision)), rel=1e-10)
    noise = torch.randn(3, len(truth), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert naive.relative_error(la.posterior_precision.bmm(noise, -1), torch.linalg.solve(precision, noise.T).T) < 1e-9


def test_a_transposed_layer_is_the_linear_layer_it_stands_for():
    """The same network with nn.Linear: the same predictive, with and without damping, and transposed samples."""
    case = CASES["transposed-tokens"]
    model, x, y = case.make()
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Pool(), nn.Linear(4, 3)).double()
    for i in (0, 3):
        plain[i].weight.data, plain[i].bias.data = model[i].weight.data.T.contiguous(), model[i].bias.data.clone()
    for structure in (*STRUCTURES, "lowrank", "gp"):
        for kwargs in ({}, {"damping": True}) if structure == "kron" else ({},):
            both = [Laplace(m, "classification", "all", structure, **kwargs) for m in (model, plain)]
            for la in both:
                la.fit(loader(x, y))
            one, two = (glm_distribution(la, x)[1] for la in both)
            assert naive.relative_error(one, two) < 1e-8, (structure, kwargs)
            assert float(both[0].log_marginal_likelihood() - both[1].log_marginal_likelihood()) == pytest.approx(
                0, abs=1e-8
            )


@pytest.mark.parametrize("structure", [*STRUCTURES, "gp"])
@pytest.mark.parametrize("name", CASES)
def test_predictive_variance_equals_dense_algebra(name, structure):
    la, model, x, y, case = fit(name, structure)
    js = naive.jacobians(model, x)
    if structure == "kron":
        h = la.H_facs.to_matrix()
    else:
        h = naive.full(model, x, y, case.likelihood, "ggn")
        h = torch.diag(h.diagonal()) if structure == "diag" else h
    expected = naive.glm_covariance(js, h + 0.6 * torch.eye(len(h), dtype=torch.float64))
    assert naive.relative_error(glm_distribution(la, x)[1], expected) < 1e-8
    assert naive.relative_error(glm_distribution(la, x, True)[1], expected.diagonal(dim1=1, dim2=2)) < 1e-8
    assert naive.relative_error(la.functional_variance(js), expected) < 1e-8


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", ["transposed-tokens", "grouped", "layer-norm", "padding"])
def test_subnetworks_keep_entries_of_every_kind_of_layer(name, structure):
    case = CASES[name]
    model, x, y = case.make()
    truth = naive.full(model, x, y, case.likelihood, "ggn")
    indices = torch.arange(1, len(truth), 3)
    la = Laplace(model, case.likelihood, "subnetwork", structure, subnetwork_indices=indices)
    la.fit(loader(x, y))
    expected = truth[indices][:, indices]
    assert naive.relative_error(la.H, expected if structure == "full" else expected.diagonal()) < 1e-10


@pytest.mark.parametrize("options", [{"max_norm": 1.0}])
def test_embeddings_whose_gradient_is_another_are_not_covered(options):
    assert not layers.is_covered(nn.Embedding(6, 3, **options))
    assert not layers.is_covered(nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize("backend", ["curvlinops", "asdl", "backpack"])
@pytest.mark.parametrize("name", ["conv1d", "grouped", "layer-norm"])
def test_other_backends_refuse_factors_of_these_layers(name, backend):
    from laplace.curvature import backend_class

    case = CASES[name]
    model, x, y = case.make()
    la = Laplace(model, "classification", "all", "kron", backend=backend_class(backend)[0])
    with pytest.raises(ValueError, match="(?i)use the native backend"):
        la.fit(loader(x, y))


class HandWritten(nn.Module):
    """Attention of two heads whose projections are linear layers."""

    def __init__(self, width):
        super().__init__()
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in self.packed(x).chunk(3, 2))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """The same by torch, with the batch first or second."""

    def __init__(self, width, batch_first):
        super().__init__()
        self.inner, self.batch_first = nn.MultiheadAttention(width, 2, batch_first=batch_first), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        found = self.inner(x, x, x, need_weights=False)[0]
        return found if self.batch_first else found.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_packed_projections_are_the_linear_layers_they_stand_for(structure, batch_first):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(3, 4), Attention(4, batch_first), Pool(), nn.Linear(4, 3)).double()
    ours = nn.Sequential(nn.Linear(3, 4), HandWritten(4), Pool(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            two.copy_(one)
    x, y = torch.randn(7, 5, 3).double(), torch.randint(3, (7,))
    found = []
    for model in (ours, theirs):
        la = Laplace(model, "classification", "all", structure, prior_precision=2.0)
        la.fit(loader(x, y, 3))
        found.append((torch.cat([t.flatten() for t in la.sums.to_tensors().values()]), glm_distribution(la, x)[1]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    kinds = {name: kind for name, kind, reason in la.coverage if "products in" in reason}
    assert set(kinds) == {
        f"1.inner.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    assert set(kinds.values()) == {structure}


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells_are_sums_over_their_steps(kind):
    """Kronecker factors of both weights, from inputs and gradients of every step that are asked for one by one."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = kind(3, 2), nn.Linear(2, 3)

        def forward(self, x):
            state = None
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    torch.manual_seed(0)
    model = Steps().double()
    x, y = torch.randn(6, 4, 3).double(), torch.randint(3, (6,))
    la = Laplace(model, "classification", "all", "kron")
    la.fit(loader(x, y, 4))
    assert all(kind == "kron" for _, kind, _ in la.coverage)
    expected = sum(torch.outer(a, a) for a in x.flatten(0, 1)) / (4 * 6)
    torch.testing.assert_close(la.H_facs.kfacs[0][1], expected)
    diag = Laplace(model, "classification", "all", "diag")
    diag.fit([(x, y)])
    torch.testing.assert_close(diag.H, naive.full(model, x, y, "classification", "ggn").diagonal())


@pytest.mark.parametrize("backend", ["curvlinops", "asdl", "backpack"])
def test_other_backends_refuse_factors_of_packed_projections(backend):
    from laplace.backends import backend_class

    cls, _ = backend_class(backend)
    model = nn.Sequential(Attention(4, True), Pool(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="no Kronecker factors for .*in_proj_weight"):
        Laplace(model, "classification", "all", "kron", backend=cls).fit(
            [(torch.randn(4, 5, 4), torch.tensor([0, 1, 2, 0]))]
        )


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_a_large_table_costs_what_its_words_do(structure, sparse):
    """No row over the whole table exists for an example: nothing is larger than the table itself."""
    from .test_memory import Largest

    model = nn.Sequential(nn.Embedding(1000, 4, sparse=sparse), Pool(), nn.Linear(4, 3)).double()
    x, y = torch.randint(1000, (8, 5)), torch.randint(3, (8,))
    la = Laplace(model, "classification", "all", structure, prior_precision=2.0)
    with Largest() as largest:
        la.fit([(x, y)])
        found = glm_distribution(la, x)[1]
    assert largest.shape.numel() <= 4000 + 15  # all parameters
    diagonal = naive.full(model, x, y, "classification", "ggn").diagonal()[:4000] if not sparse else None
    if diagonal is not None:
        ours = la.H[:4000] if structure == "diag" else la.H_facs.kfacs[0][0]
        torch.testing.assert_close(ours, diagonal)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac", "blockdiag", "lowrank", "gp"])
def test_an_empty_parameter_changes_nothing(structure):
    """Modules have one to ask for their device."""
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

    def fitted(empty):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        if empty:
            model.register_parameter("empty", nn.Parameter(torch.empty(0)))
        la = Laplace(model.double(), "regression", "all", structure)
        la.fit([(x, y)])
        return la

    one, other = fitted(True), fitted(False)
    for joint in (False, True):
        for value, wanted in zip(one(x, joint=joint), other(x, joint=joint), strict=True):
            torch.testing.assert_close(value, wanted)
    if structure == "gp":
        return
    torch.testing.assert_close(one.log_marginal_likelihood(), other.log_marginal_likelihood())
    assert one.sample(4).shape == other.sample(4).shape == (4, 20)
    torch.testing.assert_close(one.log_prob(one.mean + 1), other.log_prob(other.mean + 1))
    again = Laplace(one.model, "regression", "all", structure)
    again.load_state_dict(one.state_dict())
    torch.testing.assert_close(again(x)[1], one(x)[1])
