"""Sums do not drift: whatever the number of examples, the size of the batches and their order, small contributions count."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import backend_class
from laplace.curvature.curvature import GGNInterface
from laplace.likelihoods import Categorical
from laplace.linalg import gram
from laplace.utils.matrix import Kron

from .naive import relative_error

STRUCTURES = ("full", "kron", "diag")
BOUND = 2e-6
SEED = 3


class UserGGN(GGNInterface):
    """A user's own backend: ``full`` and ``diag`` inherited, Kronecker factors of a linear model by plain products."""

    def kron(self, x, y, N, **kwargs):
        f = self.model(x).detach()
        vs = [v.float() for v in self.directions(f.double(), y, self._offset)]
        b = sum(v.T @ v for v in vs)
        return self.likelihood_object.loss(f, y), Kron([[b, x.T @ x / N], [b]])


def backends():
    """Every backend and estimator of which there are structures, with the structures."""
    for backend in ("native", "curvlinops", "asdl", "backpack"):
        for estimator in ("ggn", "mc", "ef"):
            for structure in STRUCTURES:
                if (backend, estimator, structure) != ("backpack", "ef", "kron"):
                    yield backend, estimator, structure
    yield from (("user", "ggn", structure) for structure in STRUCTURES)


# curvlinops and BackPACK draw labels of their own, so that no reference outside of them knows the sum
UNKNOWN = {("curvlinops", "mc", "full"), ("curvlinops", "mc", "kron"), ("backpack", "mc", "kron")}
KNOWN = [case for case in backends() if case not in UNKNOWN]


def laplace(model, backend, estimator, structure, subset="all"):
    if backend == "user":
        cls, kwargs = UserGGN, {}
    else:
        cls, kwargs = backend_class(backend, estimator)
    kwargs = {**kwargs, "seed": SEED} if estimator == "mc" else kwargs
    return Laplace(model, "classification", subset, structure, backend=cls, backend_kwargs=kwargs)


def head(features=5, dtype=torch.float32):
    """Three classes; the first feature is how sure the model is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 3))
    with torch.no_grad():
        model[0].weight[:, 1:] *= 0.1 / features**0.5
        model[0].weight[:, 0] = torch.tensor([16.0, 0.0, -3.0])
    return model.to(dtype)


def examples(sureness, features=5):
    """Features of about one size, except for the first, which sets ``p (1 - p)`` to about ``exp(-sureness)``."""
    generator = torch.Generator().manual_seed(1)
    x = 0.5 + torch.rand(len(sureness), features, generator=generator)
    x[:, 0] = sureness / 16
    return x, torch.zeros(len(sureness), dtype=torch.long)


def worst(name, n, features=5):
    """``p (1 - p)`` from 0.25 to 1e-8 in each order; one example over and over; one large contribution, then tiny ones."""
    if name == "same":
        x, y = examples(torch.full((1,), 2.0), features)
        return x.repeat(n, 1), y.repeat(n)
    if name == "one-large":
        return examples(torch.cat([torch.zeros(1), torch.full((n - 1,), 16.0)]), features)
    sureness = torch.linspace(0, 18.4, n)
    return examples(sureness if name == "falling" else sureness.flip(0), features)


def directions(f, y, estimator):
    """The estimator's directions, in float64."""
    if estimator == "ef":
        return [Categorical().gradient(f, y)]
    if estimator == "mc":
        return list(Categorical().sampled_gradients(f, y, 1, SEED, 0))
    p = f.softmax(-1)
    root = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    return list((root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()[:, None]).unbind(-1))


def reference(a, vs, structure):
    """Sums of a linear layer by plain float64 arithmetic from its inputs and output gradients, by name."""
    a = torch.cat([a.double(), torch.ones(len(a), 1, dtype=torch.float64)], 1)
    vs = [v.double() for v in vs]
    b = sum(v.T @ v for v in vs)
    if structure == "kron":
        return {"0.weight/A": a[:, :-1].T @ a[:, :-1], "0.weight/B": b}
    rows = [torch.einsum("no,ni->noi", v, a) for v in vs]
    rows = [torch.cat([r[..., :-1].flatten(1), r[..., -1]], 1) for r in rows]
    if structure == "full":
        return {"full": sum(r.T @ r for r in rows)}
    diagonal = sum(r.square().sum(0) for r in rows)
    return {"0.weight/diag": diagonal[: -len(b)].view(len(b), -1), "0.bias/diag": diagonal[-len(b) :]}


def check(sums, truth, bound=BOUND):
    assert sums.tensors.keys() == truth.keys()
    errors = {name: relative_error(value, truth[name]) for name, value in sums.tensors.items()}
    assert max(errors.values()) <= bound, errors


def summed(la, x, y, batch_size, offset=0):
    la.initialize(x[:4])
    sums = la.zero_sums()
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        la.accumulate(sums, x[part], y[part], offset + start)
    return sums


def times(sums, doublings):
    """``2 ** doublings`` times a sum, by merging it with itself."""
    for _ in range(doublings):
        sums.merge(sums)
    return sums


@pytest.mark.parametrize("backend, estimator, structure", backends())
def test_a_small_batch_counts_in_full_after_millions_of_examples(backend, estimator, structure):
    """What it adds to a sum a hundred million times as large is what it adds to zero."""
    la = laplace(head(), backend, estimator, structure)
    unsure, sure = examples(torch.zeros(16)), examples(torch.full((16,), 8.0))
    alone = summed(la, *sure, 16).to_tensors()
    total = times(summed(la, *unsure, 16), 18)
    before = {name: value.clone() for name, value in total.to_tensors().items()}
    la.accumulate(total, *sure)
    for name, value in total.to_tensors().items():
        assert relative_error(value - before[name], alone[name]) < 1e-3, name


@pytest.mark.parametrize("data", ["falling", "rising", "same", "one-large"])
@pytest.mark.parametrize("backend, estimator, structure", KNOWN)
def test_one_huge_batch(backend, estimator, structure, data):
    model = head()
    x, y = worst(data, 5000)
    f = model.double()(x.double()).detach()
    sums = summed(laplace(model.float(), backend, estimator, structure), x, y, len(x))
    check(sums, reference(x, directions(f, y, estimator), structure))


def triples(*lists):
    """Every triple of values of four lists of three once: with more there are only other quadruples."""
    for i, j, k in itertools.product(range(3), repeat=3):
        yield tuple(values[n] for values, n in zip(lists, (i, j, k, (i + j + k) % 3), strict=True))


@pytest.mark.parametrize(
    "estimator, structure, batch_size, data",
    triples(("ggn", "mc", "ef"), STRUCTURES, (1, 7, 256), ("falling", "rising", "one-large")),
)
def test_many_batches(estimator, structure, data, batch_size):
    model = head()
    x, y = worst(data, 300 if batch_size == 1 else 3000)
    f = model.double()(x.double()).detach()
    sums = summed(laplace(model.float(), "native", estimator, structure), x, y, batch_size)
    check(sums, reference(x, directions(f, y, estimator), structure))


@pytest.mark.parametrize("sureness", [4.0, 8.0, 12.0, 18.4])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2]])
@pytest.mark.parametrize("backend, estimator, structure", [c for c in KNOWN if c[0] in ("native", "asdl", "user")])
def test_sure_examples_alone(backend, estimator, structure, order, sureness):
    """``1 - p`` of the likely class, first or not, is not a difference of rounded numbers."""
    model = head()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[order])
    x, y = examples(torch.full((200,), sureness))
    y += order[0]
    f = model.double()(x.double()).detach()
    vs = directions(f, y, estimator)
    sums = summed(laplace(model.float(), backend, estimator, structure), x, y, 100)
    check(sums, reference(x, vs, structure))


@pytest.mark.parametrize("data", ["falling", "same", "one-large"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sums_of_several_blocks(structure, data):
    """Wider than a block of the sums, so in parts, of which those below the diagonal are mirrored."""
    model = head(features=400)
    x, y = worst(data, 1000, features=400)
    f = model.double()(x.double()).detach()
    sums = summed(laplace(model.float(), "native", "ggn", structure), x, y, len(x))
    check(sums, reference(x, directions(f, y, "ggn"), structure))


@pytest.mark.parametrize("width", [20, 130])
def test_very_many_rows(width):
    """One row over and over is rounded in the same direction every time."""
    row = torch.rand(1, width, generator=torch.Generator().manual_seed(0))
    n = 200_000
    total = torch.zeros(width, width, dtype=torch.float64)
    gram.add_gram_(total, [row.expand(n, -1)])
    assert relative_error(total, n * row.double().T @ row.double()) < BOUND
    product = torch.zeros(width, width, dtype=torch.float64)
    gram.add_product_(product, row.expand(n, -1), row.expand(n, -1))
    assert relative_error(product, n * row.double().T @ row.double()) < BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_models(structure, subset, dtype):
    """Against exact sums of what the model itself has rounded: its inputs, its outputs and, going backward, directions."""
    model = head(dtype=dtype)
    x, y = worst("falling", 2000)
    x = x.to(dtype)
    vs = list(Categorical().hessian_root(model(x).detach().double(), None))
    vs = [v.to(dtype) for v in vs] if subset == "all" else vs
    sums = summed(laplace(model, "native", "ggn", structure, subset), x, y, 500)
    check(sums, reference(x, vs, structure))


@pytest.mark.parametrize("estimator", ["ggn", "mc", "ef"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_partition_of_float32_equals_the_whole(structure, estimator):
    x, y = worst("falling", 600)
    la = laplace(head(), "native", estimator, structure)
    whole = summed(la, x, y, len(x))
    for cuts in ([0, 1, 599, 600], [0, 300, 301, 600]):
        one, two, three = (summed(la, x[a:b], y[a:b], 64, a) for a, b in zip(cuts, cuts[1:], strict=False))
        check(three.merge(one.merge(two)), whole.tensors)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merging_associates_to_the_digits_of_float64(structure):
    la = laplace(head(), "native", "ggn", structure)
    x, y = worst("rising", 300)

    def parts():
        return [summed(la, x[a : a + 100], y[a : a + 100], 100, a) for a in (0, 100, 200)]

    (a, b, c), (d, e, f) = parts(), parts()
    check(a.merge(b).merge(c), d.merge(e.merge(f)).tensors, 1e-12)
