"""The BackPACK backends: equal to the native sums for nn.Sequential, a ValueError that names a way out for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import backend_class
from laplace.curvature.backpack import BackPackEF, BackPackGGN
from laplace.curvature.conformance import SumsConformance
from laplace.errors import NonFiniteError

from . import naive
from .models import CASES, Case, conv, loader, mlp
from .test_asdl import STRUCTURES, TOLERANCE, check_equal_sums, fit

NOT_SEQUENTIAL = "BackPACK backend takes nn.Sequential models only"
NO_FACTORS = "BackPACK has no Kronecker factors for .*Use the native backend"
SHARED = "sum over them before the outer product, which is not KFAC-expand.*Use the native backend"
PADDING = "padded with a number of zeros"
MODULES = (
    "twice",
    "tied",
    "used-outside",
    "normed",
    "embedding",
    "inplace-residual",
    "inplace-residual-fallback",
    "scalar",
)
# What it refuses, by model and structure; everything else has to agree with the native backend.
REFUSED = {
    **{(name, s): NOT_SEQUENTIAL for name in MODULES for s in STRUCTURES},
    **{(name, "kron"): NO_FACTORS for name in MODULES if name not in ("twice", "inplace-residual")},
    **{(name, s): PADDING for name in ("same-dilation", "reflect", "circular-same") for s in STRUCTURES},
    **{(name, "kron"): SHARED for name in ("stride-padding", "valid-no-bias", "two-convolutions")},
    ("grouped", "kron"): NO_FACTORS,
    ("sequence", "kron"): "does not have an extension for Module .*Pool.*Use the native backend",
    ("sequence-output", "kron"): "outputs of shape .*Use the native backend",
    ("sequence-regression", "kron"): "outputs of shape .*Use the native backend",
}


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_equals_native_or_names_the_alternative(name, structure, estimator):
    case = CASES[name]
    message = REFUSED.get((name, structure))
    if structure == "kron" and estimator == "ef":
        message = "no Kronecker factors of the empirical Fisher. Use NativeEF"
    if message:
        with pytest.raises(ValueError, match=message):
            fit(case, structure, ("backpack", estimator))
    else:
        check_equal_sums(fit(case, structure, ("backpack", estimator)), fit(case, structure, ("native", estimator)))


@pytest.mark.parametrize("kernel", [(4, 4), (3, 4)])
def test_convolutions_with_one_position_have_kronecker_factors(kernel):
    positions = 5 - kernel[0]
    case = Case(lambda: conv(nn.Conv2d(2, 3, kernel, padding="valid"), 3 * positions), (2, 4, 4))
    if positions == 1:
        check_equal_sums(fit(case, "kron", ("backpack", "ggn")), fit(case, "kron", ("native", "ggn")))
    else:
        with pytest.raises(ValueError, match=SHARED):
            fit(case, "kron", ("backpack", "ggn"))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "no-bias", "twice"])
def test_last_layer_equals_native(name, structure, estimator, likelihood):
    """Of any model: its last layer alone is what BackPACK sees."""
    case = Case(CASES[name].build, CASES[name].shape, likelihood=likelihood)
    if (structure, estimator) != ("kron", "ef"):
        one = fit(case, structure, ("backpack", estimator), "last_layer")
        check_equal_sums(one, fit(case, structure, ("native", estimator), "last_layer"))


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", ["mlp", "regression", "stride-padding"])
def test_monte_carlo_draws_are_the_native_ones_for_dense_structures(name, structure):
    kwargs = {"seed": 11, "num_samples": 3}
    one = fit(CASES[name], structure, ("backpack", "mc"), **kwargs)
    check_equal_sums(one, fit(CASES[name], structure, ("native", "mc"), **kwargs))


@pytest.mark.parametrize("name", ["mlp", "regression"])
def test_monte_carlo_kron_is_unbiased_repeatable_and_leaves_the_generator_alone(name):
    exact = fit(CASES[name], "kron", ("native", "ggn"))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one = fit(CASES[name], "kron", ("backpack", "mc"), seed=1, num_samples=20_000)
    CASES[name].make()  # seeds the generator, as fit did
    torch.manual_seed(0)
    fit_again = fit(CASES[name], "kron", ("backpack", "mc"), seed=1, num_samples=20_000)
    check_equal_sums(one, fit_again, 1e-15)
    check_equal_sums(one, exact, 0.03)
    model, x, y = CASES[name].make()
    backend = BackPackGGN(model, CASES[name].likelihood, stochastic=True, seed=1)
    torch.manual_seed(0)
    backend.kron(x, y, N=5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["mlp", "stride-padding", "grouped", "sequence-output", "frozen"])
def test_jacobians_and_gradients_equal_naive(name):
    case = CASES[name]
    model, x, y = case.make()
    backend = BackPackEF(model, case.likelihood)
    js, f = backend.jacobians(x)
    assert naive.relative_error(js, naive.jacobians(model, x)) < TOLERANCE
    assert naive.relative_error(f, model(x).detach()) < TOLERANCE
    gradients, loss = backend.gradients(x, y)
    truth = [naive.example_gradient(model, a, b, case.likelihood) for a, b in zip(x, y, strict=True)]
    assert naive.relative_error(gradients, torch.stack(truth)) < TOLERANCE
    assert float(loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)))


def test_gradients_pass_through_the_predictive_to_the_inputs():
    model, x, y = CASES["regression"].make()
    la = Laplace(model, "regression", "all", "diag", backend=BackPackGGN, enable_backprop=True)
    la.fit(loader(x, y))

    def variance(inputs):
        return la(inputs)[1].diagonal(dim1=1, dim2=2).sum()

    assert torch.autograd.gradcheck(variance, x[:2].clone().requires_grad_())


def test_kron_divides_the_input_side_by_n():
    model, x, y = CASES["regression"].make()
    ours = BackPackGGN(model, "regression").kron(x, y, N=20)[1].kfacs
    for (left, *right), (b, *a) in zip(ours, naive.kron(model, x, y, "regression", "ggn"), strict=True):
        assert naive.relative_error(left, b) < TOLERANCE
        assert not right or naive.relative_error(right[0], a[0] * len(y) / 20) < TOLERANCE


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: CASES["twice"].build(), "but the model is Twice. Use the native"),
        (lambda: nn.Sequential(nn.Linear(3, 3), CASES["tied"].build()), "but its part '1' is Tied. Use the native"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)), "Use the native backend"),
    ],
)
def test_other_models_are_refused(build, message):
    model, x, y = Case(build).make()
    with pytest.raises(ValueError, match=message):
        Laplace(model, "classification", "all", "diag", backend=BackPackGGN).fit(loader(x, y))


def test_a_layer_that_runs_twice_in_a_sequence_is_refused():
    shared = nn.Linear(3, 3)
    model, x, y = Case(lambda: nn.Sequential(shared, nn.Tanh(), shared)).make()
    with pytest.raises(ValueError, match="BackPACK's per-example gradients of '0.weight' are not its gradients"):
        BackPackGGN(model, "classification").diag(x, y)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_model_is_left_as_found(subset, structure):
    model, x, y = CASES["inplace-relu"].make()
    model.train()
    before = {name: (p, p.clone(), dict(p.__dict__)) for name, p in model.named_parameters()}
    hooks = [{k: dict(v) for k, v in vars(m).items() if "hook" in k and v is not None} for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    la = Laplace(model, "classification", subset, structure, backend=BackPackGGN)
    la.fit(loader(x, y))
    la.backend.jacobians(x)
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [{k: dict(v) for k, v in vars(m).items() if "hook" in k and v is not None} for m in model.modules()] == hooks
    assert model[1].inplace
    assert all(m.training for m in model.modules())
    for name, p in model.named_parameters():
        same, value, marks = before[name]
        assert p is same
        assert torch.equal(p, value)
        assert p.__dict__ == marks
        assert p.grad is None


@pytest.mark.parametrize("structure", STRUCTURES)
def test_bad_examples_are_named_by_global_index(structure):
    model, x, y = CASES["mlp"].make()
    x[3] = torch.inf
    la = Laplace(model, "classification", "all", structure, backend=BackPackGGN)
    with pytest.raises(NonFiniteError, match="indices 3"):
        la.fit(loader(x, y))
    x, y = CASES["mlp"].make()[1:]
    y[4] = -1
    with pytest.raises(ValueError, match="Label -1 of example 4"):
        la.fit(loader(x, y))


def test_predictions_and_evidence_equal_native():
    model, x, y = CASES["regression"].make(n=8)
    results = []
    for backend in ("native", "backpack"):
        la = Laplace(model, "regression", "all", "kron", backend=backend_class(backend)[0])
        la.fit(loader(x, y))
        la.optimize_prior_precision(n_steps=5)
        results.append([la.log_marginal_likelihood(), *la(x)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


class TestConformance(SumsConformance):
    backend = BackPackGGN
    likelihood = "regression"


class TestConformanceMonteCarlo(SumsConformance):
    backend = BackPackGGN
    backend_kwargs = {"stochastic": True, "seed": 5}
    hessian_structure = "diag"


def test_models_that_cannot_be_copied_are_refused():
    model = mlp().double()
    model.cache = model[0](torch.randn(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot be copied.*Use the native backend"):
        BackPackGGN(model, "classification").jacobians(torch.randn(2, 3, dtype=torch.float64))


def transposed():
    layers = (
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 2),
    )
    return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), *layers)


def twice():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(8, 2))


@pytest.mark.parametrize(("make", "structure"), [(transposed, "diag"), (transposed, "full"), (twice, "kron")])
def test_what_backpack_stumbles_over_is_one_sentence(make, structure):
    la = Laplace(make(), "regression", "all", structure, backend=BackPackGGN)
    with pytest.raises(ValueError, match=r"BackPACK cannot treat this model: .* Use the native backend"):
        la.fit([(torch.randn(4, 8), torch.randn(4, 2))])
