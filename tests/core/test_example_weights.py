"""Weights of examples: an example of weight 2 is that example twice, in every factor, in loss and number of examples."""

from __future__ import annotations

import pytest
import torch

from laplace import Laplace, SketchedLowRankLaplace
from laplace.backends import backend_class
from laplace.likelihoods import GaussianPerOutput, WeightedCategorical
from laplace.structures.registry import SECOND_PASSES

from . import naive, naive_likelihoods
from .models import CASES, mlp
from .random_laws import LAWS
from .test_drift import UserGGN
from .test_last_layer import last_layer

EXACT = 1e-12
WHOLE = torch.tensor([2.0, 0.0, 1.0, 3.0, 1.0])
TIMES = torch.tensor([0, 0, 2, 3, 3, 3, 4])  # the same by repetition
REAL = torch.tensor([0.3, 2.7, 0.0, 1.0, 0.05], dtype=torch.float64)
SOME = ("mlp", "regression", "no-bias", "two-convolutions", "sequence", "sequence-output", "tied", "normed", "embedding", "grouped")  # fmt: skip
STRUCTURES = ("full", "diag", "kron", "blockdiag", "ekfac")


def posterior(model, likelihood, structure, estimator="ggn", subset="all", **options):
    cls, given = backend_class("native", estimator)
    if structure == "lowrank":
        return SketchedLowRankLaplace(model, likelihood, backend=cls, backend_kwargs={**given, **options}, rank=200)
    return Laplace(model, likelihood, subset, structure, backend=cls, backend_kwargs={**given, **options})


def added(la, zero, x, y, weights, size=None):
    """Batches added to a sum that `zero` begins."""
    sums, size = zero(), size or len(x)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        given = {} if weights is None else {"example_weights": weights[part]}
        la.accumulate(sums, x[part], y[part], offset=start, **given)
    return sums


def passes(la, x, y, weights=None, basis=None, size=None):
    """The sums of every pass; in a basis, if one is given, that another fit has found."""
    la.initialize(x)
    first = added(la, la.zero_sums, x, y, weights, size)
    law = SECOND_PASSES.get(la.structure)
    if law is None:
        return [first], None
    basis = law.find_all(first) if basis is None else basis
    return [first, added(la, lambda: la.second_sums(basis), x, y, weights, size)], basis


def check_same(ours, theirs, tolerance):
    for one, two in zip(ours, theirs, strict=True):
        assert one.n_data == pytest.approx(two.n_data, rel=1e-12)
        assert float(one.loss) == pytest.approx(float(two.loss), rel=tolerance)
        for name, value in two.tensors.items():
            assert naive.relative_error(one.tensors[name], value) < tolerance, name


# --- the law ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank"])
@pytest.mark.parametrize("name", SOME)
def test_whole_weights_are_repetitions(name, structure, estimator):
    """Also of two batches, cut elsewhere than the repeated ones."""
    model, x, y = CASES[name].make()
    la = posterior(model, CASES[name].likelihood, structure, estimator)
    repeated, basis = passes(la, x[TIMES], y[TIMES])
    check_same(passes(la, x, y, WHOLE, basis)[0], repeated, EXACT)
    check_same(passes(la, x, y, WHOLE, basis, size=3)[0], repeated, EXACT)


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank"])
@pytest.mark.parametrize("name", ["mlp", "two-convolutions", "regression"])
def test_whole_weights_are_repetitions_in_single_precision(name, structure):
    model, x, y = CASES[name].make(dtype=torch.float32)
    la = posterior(model, CASES[name].likelihood, structure)
    repeated, basis = passes(la, x[TIMES], y[TIMES])
    check_same(passes(la, x, y, WHOLE, basis)[0], repeated, 2e-6)  # the bound of sums, see the README


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["sequence", "two-convolutions", "twice"])
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_weights_that_positions_share(structure, name, approximation):
    model, x, y = CASES[name].make()
    la = posterior(model, CASES[name].likelihood, structure, kfac_approx=approximation)
    repeated, basis = passes(la, x[TIMES], y[TIMES])
    check_same(passes(la, x, y, WHOLE, basis)[0], repeated, EXACT)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("name", ["mlp", "ten-classes", "regression", "no-bias"])
def test_closed_forms_of_the_last_layer(name, estimator, structure):
    model, x, y = CASES[name].make()
    la = posterior(model, CASES[name].likelihood, structure, estimator, "last_layer")
    check_same(passes(la, x, y, WHOLE)[0], passes(la, x[TIMES], y[TIMES])[0], EXACT)


LIKELIHOODS = {
    **{name: (law.ours, law.naive, law.targets, law.outputs[-1]) for name, law in LAWS.items()},
    "soft": (
        WeightedCategorical(soft_targets=True),
        naive_likelihoods.Weighted(soft_targets=True),
        lambda n, c: torch.rand(n, c).double().softmax(-1),
        3,
    ),
    "noise-per-output": (GaussianPerOutput([0.5, 2.0]), None, lambda n, c: torch.randn(n, c).double(), 2),
}


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("word", LIKELIHOODS)
def test_every_likelihood(word, structure, subset, estimator):
    ours, _, targets, outputs = LIKELIHOODS[word]
    torch.manual_seed(0)
    model, x, y = mlp(outputs=outputs).double().eval(), torch.randn(5, 3).double(), targets(5, outputs)
    la = posterior(model, ours, structure, estimator, subset)
    check_same(passes(la, x, y, WHOLE)[0], passes(la, x[TIMES], y[TIMES])[0], EXACT)


def test_preferences():
    model, x, y = CASES["two-classes"].make()
    la = posterior(model, "reward_modeling", "kron")
    check_same(passes(la, x, y, WHOLE)[0], passes(la, x[TIMES], y[TIMES])[0], EXACT)


def test_sampled_labels_do_not_depend_on_weights():
    """Weighted draws are the same draws: each example's part times its weight, whatever the others'."""
    model, x, y = CASES["mlp"].make()
    la = posterior(model, "classification", "full", "mc", seed=3, num_samples=2)
    alone = []
    for n in range(len(x)):
        la.initialize(x)
        sums = la.zero_sums()
        la.accumulate(sums, x[n : n + 1], y[n : n + 1], offset=n)
        alone.append(sums.tensors["full"])
    expected = sum(w * part for w, part in zip(REAL, alone, strict=True))
    assert naive.relative_error(passes(la, x, y, REAL)[0][0].tensors["full"], expected) < EXACT


# --- real weights against definitions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "ten-classes", "regression", "no-bias"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_real_weights_of_a_last_layer(name, structure):
    """Against the dense curvature of a model whose other layers are frozen."""
    case = CASES[name]
    model, x, y = case.make()
    la = posterior(model, case.likelihood, structure, subset="last_layer")
    la.set_sums(passes(la, x, y, REAL)[0][0])
    frozen = last_layer(case.make()[0])
    dense = over_examples(x, y, lambda x, y: naive.full(frozen, x, y, case.likelihood, "ggn"))
    if structure == "kron":
        alone = [naive.kron(frozen, x[n : n + 1], y[n : n + 1], case.likelihood, "ggn") for n in range(len(x))]
        assert naive.relative_error(la.H_facs.to_matrix(), naive.kron_matrix(weighted_factors(alone))) < EXACT
    else:
        assert naive.relative_error(la.H, dense if structure == "full" else dense.diagonal()) < EXACT


def weighted_factors(alone):
    """Kronecker factors of all examples from those of each: B is weighted, A is a weighted mean."""
    factors = []
    for parameter in zip(*alone, strict=True):
        sums = [sum(w * f for w, f in zip(REAL, fs, strict=True)) for fs in zip(*parameter, strict=True)]
        factors.append([sums[0], *(f / REAL.sum() for f in sums[1:])])
    return factors


def over_examples(x, y, part):
    """Σ w of what `part` gives of one example alone."""
    return sum(w * part(x[n : n + 1], y[n : n + 1]) for n, w in enumerate(REAL))


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", ["full", "diag", "blockdiag", "lowrank"])
@pytest.mark.parametrize("name", SOME)
def test_real_weights_are_those_of_the_dense_curvature(name, structure, estimator):
    likelihood = CASES[name].likelihood
    model, x, y = CASES[name].make()
    la = posterior(model, likelihood, structure, estimator)
    sums, basis = passes(la, x, y, REAL)
    (la.set_sums(sums[0]) if basis is None else la.set_second_sums(sums[1], basis))
    dense = over_examples(x, y, lambda x, y: naive.full(model, x, y, likelihood, estimator))
    if structure == "diag":
        assert naive.relative_error(la.H, dense.diagonal()) < EXACT
    elif structure == "lowrank":
        vectors, values = (la.sums.tensors[key] for key in ("vectors", "values"))
        assert naive.relative_error((vectors * values) @ vectors.T, dense) < EXACT
    elif structure == "full":
        assert naive.relative_error(la.H, dense) < EXACT
    else:
        inside = torch.block_diag(*[torch.ones_like(block) for block in la.H])
        assert naive.relative_error(torch.block_diag(*la.H), inside * dense) < EXACT
    loss = over_examples(x, y, lambda x, y: naive.loss(model, x, y, likelihood))
    assert float(la.loss) == pytest.approx(float(loss), rel=1e-12)
    assert la.n_data == pytest.approx(float(REAL.sum()))


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("name", ["mlp", "regression", "two-convolutions", "sequence", "tied", "normed", "embedding"])
def test_real_weights_of_kronecker_factors(name, estimator):
    """B is weighted, A is a weighted mean: the weighted sum over that of the weights."""
    case = CASES[name]
    model, x, y = case.make()
    la = posterior(model, case.likelihood, "kron", estimator)
    la.set_sums(passes(la, x, y, REAL)[0][0])
    alone = [
        naive.kron(model, x[n : n + 1], y[n : n + 1], case.likelihood, estimator, case.fallback) for n in range(len(x))
    ]
    assert naive.relative_error(la.H_facs.to_matrix(), naive.kron_matrix(weighted_factors(alone))) < EXACT


@pytest.mark.parametrize("name", ["mlp", "two-convolutions", "sequence", "tied"])
def test_real_weights_of_second_moments(name):
    """The diagonal of the dense weighted curvature in the basis of the weighted factors."""
    case = CASES[name]
    model, x, y = case.make()
    la = posterior(model, case.likelihood, "ekfac")
    sums, basis = passes(la, x, y, REAL)
    la.set_second_sums(sums[1], basis)
    dense = over_examples(x, y, lambda x, y: naive.full(model, x, y, case.likelihood, "ggn"))
    start = 0
    for vectors, (table,) in zip(la.H.eigenvectors, la.H.eigenvalues, strict=True):
        sides = [torch.eye(n).double() if q is None else q for q, n in zip(vectors, table.shape, strict=True)]
        basis = torch.kron(*sides) if len(sides) == 2 else sides[0]
        block = dense[start : start + len(basis), start : start + len(basis)]
        assert naive.relative_error(table.flatten(), (basis.T @ block @ basis).diagonal()) < 1e-10
        start += len(basis)


@pytest.mark.parametrize("word", [word for word, (_, law, *_) in LIKELIHOODS.items() if law is not None])
def test_real_weights_of_every_likelihood_against_its_definition(word):
    ours, law, targets, outputs = LIKELIHOODS[word]
    torch.manual_seed(0)
    model, x, y = mlp(outputs=outputs).double().eval(), torch.randn(5, 3).double(), targets(5, outputs)
    la = posterior(model, ours, "full")
    la.set_sums(passes(la, x, y, REAL)[0][0])
    dense = over_examples(x, y, lambda x, y: naive.full(model, x, y, law, "ggn"))
    loss = over_examples(x, y, lambda x, y: naive.loss(model, x, y, law))
    assert naive.relative_error(la.H, dense) < EXACT and float(la.loss) == pytest.approx(float(loss), rel=1e-12)


def test_a_subnetwork():
    model, x, y = CASES["mlp"].make()
    chosen = torch.tensor([1, 5, 12, 20, 26])
    la = Laplace(model, "classification", "subnetwork", "full", subnetwork_indices=chosen)
    sums = passes(la, x, y, REAL)[0][0]
    dense = over_examples(x, y, lambda x, y: naive.full(model, x, y, "classification", "ggn"))
    assert naive.relative_error(sums.tensors["full"], dense[chosen][:, chosen]) < EXACT


def test_evidence_and_predictions_follow():
    """A posterior of weighted examples is that of repeated ones, the noise's constant in the evidence among it."""
    model, x, y = CASES["regression"].make()
    found = []
    for inputs, targets, weights in ((x, y, WHOLE), (x[TIMES], y[TIMES], None)):
        la = posterior(model, "regression", "kron")
        la.set_sums(passes(la, inputs, targets, weights)[0][0])
        la.sigma_noise = 0.4
        found.append((float(la.log_marginal_likelihood(torch.tensor([0.6]).double())), la(x)[1]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert naive.relative_error(found[0][1], found[1][1]) < 1e-10


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank"])
def test_weights_of_one_change_nothing(structure):
    """Bit for bit."""
    model, x, y = CASES["two-convolutions"].make(dtype=torch.float32)
    la = posterior(model, "classification", structure)
    plain, basis = passes(la, x, y)
    for one, two in zip(passes(la, x, y, torch.ones(5), basis)[0], plain, strict=True):
        assert one.n_data == two.n_data and all(
            torch.equal(one.tensors[name], two.tensors[name]) for name in two.tensors
        )


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, -0.5, 1.0, 1.0, 1.0], r"weight of example 101 is -0\.5; .*0 leaves an example out"),
        ([1.0, 1.0, float("nan"), 1.0, 1.0], "weight of example 102 is nan"),
        ([1.0, 1.0, 1.0, 1.0, float("inf")], "weight of example 104 is inf"),
        ([1.0, 1.0], r"shape \(2,\) for a batch of 5 examples"),
        ([[1.0]] * 5, r"shape \(5, 1\) for a batch of 5 examples"),
    ],
)
def test_what_is_no_weight_is_refused_and_nothing_is_added(weights, said):
    model, x, y = CASES["mlp"].make()
    la = posterior(model, "classification", "kron")
    la.initialize(x)
    sums = la.zero_sums()
    with pytest.raises(ValueError, match=said):
        la.accumulate(sums, x, y, offset=100, example_weights=weights)
    assert sums.n_data == 0 and all(not bool(value.any()) for value in sums.tensors.values())


def test_weights_that_are_all_zero_make_no_posterior():
    model, x, y = CASES["mlp"].make()
    la = posterior(model, "classification", "kron")
    with pytest.raises(ValueError, match="hold no example"):
        la.set_sums(passes(la, x, y, torch.zeros(5))[0][0])


def test_other_backends_are_refused_by_name():
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", "full", backend=UserGGN)
    la.initialize(x)
    with pytest.raises(ValueError, match="UserGGN takes no weights of examples"):
        la.accumulate(la.zero_sums(), x, y, example_weights=REAL)
