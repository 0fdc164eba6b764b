"""Curvature of both backends against naive float64 references, and the Monte-Carlo Fisher's promises."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import backend_class
from laplace.predictive import glm_distribution

from . import naive
from .models import CASES, Case, loader, mlp

TOLERANCE = 1e-10
STRUCTURES = ("full", "kron", "diag")


def fit(model, likelihood, structure, x, y, subset="all", backend=("native", "ggn"), batch_size=2, **kwargs):
    cls, options = backend_class(*backend)
    la = Laplace(model, likelihood, subset, structure, backend=cls, backend_kwargs={**options, **kwargs})
    la.fit(loader(x, y, batch_size))
    return la


def curvature(la):
    """The curvature of any structure as a dense matrix or the diagonal."""
    return la.H_facs.to_matrix() if la.structure == "kron" else la.H


def last_layer_of(model, x):
    """The model's last layer as a network of its own, and its inputs."""
    layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    kept = []
    handle = layer.register_forward_hook(lambda m, args, out: kept.append(args[0].detach()))
    model(x)
    handle.remove()
    return layer, kept[0]


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_native_equals_naive(name, structure, estimator):
    case = CASES[name]
    model, x, y = case.make()
    la = fit(model, case.likelihood, structure, x, y, backend=("native", estimator))
    if structure == "kron":
        expected = naive.kron(model, x, y, case.likelihood, estimator, case.fallback)
        assert len(la.H_facs.kfacs) == len(expected)
        for ours, theirs in zip(la.H_facs.kfacs, expected, strict=True):
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert naive.relative_error(a, b) < TOLERANCE
    else:
        expected = naive.full(model, x, y, case.likelihood, estimator)
        expected = expected if structure == "full" else expected.diagonal()
        assert naive.relative_error(la.H, expected) < TOLERANCE
    assert float(la.loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)), rel=1e-12)
    assert la.n_data == len(x)


@pytest.mark.parametrize("name", CASES)
def test_coverage_names_what_falls_back(name):
    case = CASES[name]
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, "all", "kron")
    la.initialize(x)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [row[0] for row in la.coverage] == trainable
    assert tuple(row[0] for row in la.coverage if row[1] == "diag") == case.fallback
    assert all("diagonal block" in row[2] for row in la.coverage if row[0] in case.fallback)
    assert all(row[0] in str(la.coverage) for row in la.coverage)


@pytest.mark.parametrize(
    "name, parameter, reason",
    [
        ("tied", "one.weight", r"tied weight \(one.weight, two.weight\)"),
        ("used-outside", "one.weight", "used outside its module's calls"),
        ("normed", "ln.weight", "LayerNorm"),
        ("embedding", "table.weight", "Embedding"),
        ("mlp", "0.weight", "Linear"),
    ],
)
def test_coverage_says_why(name, parameter, reason):
    model, x, _ = CASES[name].make()
    la = Laplace(model, "classification", "all", "kron")
    la.initialize(x)
    (row,) = [row for row in la.coverage if row[0] == parameter]
    assert re.search(reason, row[2])


@pytest.mark.parametrize(
    "name", ["mlp", "stride-padding", "sequence", "tied", "normed", "frozen", "sequence-output", "scalar"]
)
def test_native_jacobians_equal_naive(name):
    case = CASES[name]
    model, x, _ = case.make()
    la = Laplace(model, case.likelihood, "all", "diag")
    expected = naive.jacobians(model, x)
    for js, f in (la.backend.jacobians(x), la.backend.functorch_jacobians(x)):
        assert js.shape == expected.shape
        assert naive.relative_error(js, expected) < TOLERANCE
        assert torch.equal(f, model(x).detach()) or naive.relative_error(f, model(x).detach()) < TOLERANCE


def test_gradients_are_per_example_gradients_of_the_loss():
    for name in ("mlp", "regression", "normed", "sequence-output", "scalar"):
        case = CASES[name]
        model, x, y = case.make()
        gradients, loss = Laplace(model, case.likelihood, "all", "diag").backend.gradients(x, y)
        expected = [naive.example_gradient(model, xi, yi, case.likelihood) for xi, yi in zip(x, y, strict=True)]
        assert naive.relative_error(gradients, torch.stack(expected)) < TOLERANCE
        assert float(loss) == pytest.approx(float(naive.loss(model, x, y, case.likelihood)))


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_curvlinops_agrees_with_native(name, structure, estimator):
    case = CASES[name]
    model, x, y = case.make()
    if structure not in case.curvlinops:
        with pytest.raises((ValueError, NotImplementedError), match="native|Unequal padding"):
            fit(model, case.likelihood, structure, x, y, backend=("curvlinops", estimator))
        return
    ours = fit(model, case.likelihood, structure, x, y, backend=("native", estimator))
    theirs = fit(model, case.likelihood, structure, x, y, backend=("curvlinops", estimator))
    assert naive.relative_error(curvature(theirs), curvature(ours)) < TOLERANCE
    assert float(theirs.loss) == pytest.approx(float(ours.loss), rel=1e-12)


@pytest.mark.parametrize("estimator", ["ggn", "ef"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("name", ["mlp", "regression", "no-bias", "stride-padding", "ten-classes", "tied"])
def test_last_layer_equals_naive(name, backend, structure, estimator):
    case = CASES[name]
    model, x, y = case.make()
    la = fit(model, case.likelihood, structure, x, y, "last_layer", (backend, estimator))
    layer, features = last_layer_of(model, x)
    if structure == "kron":
        expected = naive.kron_matrix(naive.kron(layer, features, y, case.likelihood, estimator))
    else:
        expected = naive.full(layer, features, y, case.likelihood, estimator)
        expected = expected if structure == "full" else expected.diagonal()
    assert naive.relative_error(curvature(la), expected) < TOLERANCE


@pytest.mark.parametrize("structure", STRUCTURES)
def test_last_layer_with_a_frozen_bias(structure):
    case = CASES["mlp"]
    model, x, y = case.make()
    model[2].bias.requires_grad_(False)
    la = fit(model, case.likelihood, structure, x, y, "last_layer")
    layer, features = last_layer_of(model, x)
    expected = naive.full(layer, features, y, case.likelihood, "ggn")
    if structure == "full":
        assert naive.relative_error(la.H, expected) < TOLERANCE
    assert la.n_params == 12
    js, _ = la.backend.functorch_jacobians(x)
    assert naive.relative_error(js, naive.jacobians(layer, features)) < TOLERANCE


def test_biases_share_the_output_factor_of_their_weight():
    case = CASES["mlp"]
    model, x, y = case.make()
    la = fit(model, case.likelihood, "kron", x, y)
    assert set(la.sums.tensors) == {"0.weight/A", "0.weight/B", "2.weight/A", "2.weight/B"}
    assert la.sums.spec.factors["0.weight/A"].symmetric


def test_wide_factors_are_complete_and_symmetric():
    """Wide sums are computed as block triangles; the rest has to be mirrored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 530), nn.Tanh(), nn.Linear(530, 2)).double()
    x, y = torch.randn(6, 700, dtype=torch.float64), torch.randint(2, (6,))
    la = fit(model, "classification", "kron", x, y, batch_size=4)
    factor = la.sums.tensors["0.weight/A"]
    assert naive.relative_error(factor, factor.T) < 1e-14
    assert naive.relative_error(factor, x.T @ x) < TOLERANCE
    b, _ = naive.layer_factors(model, [model[0]], x, y, "classification", "ggn")
    assert naive.relative_error(la.sums.tensors["0.weight/B"], b) < TOLERANCE
    small = nn.Linear(300, 2).double()
    la = fit(small, "classification", "full", x[:, :300], y, batch_size=4)
    assert naive.relative_error(la.H, naive.full(small, x[:, :300], y, "classification", "ggn")) < TOLERANCE


def test_wide_convolutions():
    """Layers with many channels and patches take other ways through memory than the narrow ones above."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 70, 3, stride=2, padding=1)
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(280, 2)).double()
    x, y = torch.randn(3, 8, 4, 4, dtype=torch.float64), torch.randint(2, (3,))
    for estimator in ("ggn", "ef"):
        la = fit(model, "classification", "kron", x, y, backend=("native", estimator))
        b, a = naive.layer_factors(model, [convolution], x, y, "classification", estimator)
        assert naive.relative_error(la.H_facs.kfacs[0][0], b) < TOLERANCE
        assert naive.relative_error(la.H_facs.kfacs[0][1], a) < TOLERANCE
        diagonal = fit(model, "classification", "diag", x, y, backend=("native", estimator)).H
        js = naive.jacobians(model, x)
        if estimator == "ggn":
            hessians = [naive.output_hessian(f, "classification") for f in model(x).detach()]
            truth = sum(((h @ j) * j).sum(0) for h, j in zip(hessians, js, strict=True))
            assert naive.relative_error(diagonal, truth) < TOLERANCE


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "two-convolutions", "stride-padding", "sequence", "twice", "sequence-output"])
def test_chunks_do_not_change_sums_or_variances(name, structure, monkeypatch):
    """Temporaries are bounded by working on ranges of examples and blocks of columns; here these are tiny."""
    from laplace.capture import contractions
    from laplace.structures import diag, full, kron

    case = CASES[name]
    model, x, y = case.make()
    expected = fit(model, case.likelihood, structure, x, y)
    variance = glm_distribution(expected, x)[1]
    sizes = [
        (module, n)
        for module in (contractions, diag, full, kron)
        for n, value in vars(module).items()
        if n.isupper() and isinstance(value, int)
    ]
    assert {(contractions, "_CHUNK"), (kron, "_PATCHES"), (kron, "_ROWS"), (full, "_ROWS")} == set(sizes)
    for module, constant in sizes:
        monkeypatch.setattr(module, constant, 2)
    la = fit(model, case.likelihood, structure, x, y)
    assert naive.relative_error(curvature(la), curvature(expected)) < TOLERANCE
    assert naive.relative_error(glm_distribution(la, x)[1], variance) < TOLERANCE


@pytest.mark.parametrize("structure", STRUCTURES)
def test_model_takes_dict_batches(structure):
    class FromDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, batch):
            return self.net(batch["input_ids"])

    torch.manual_seed(0)
    model = FromDict().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    batches = [{"input_ids": x[:3], "labels": y[:3]}, {"input_ids": x[3:], "labels": y[3:]}]
    la = Laplace(model, "classification", "all", structure)
    la.fit(batches)
    plain = fit(model.net, "classification", structure, x, y)
    assert naive.relative_error(curvature(la), curvature(plain)) < TOLERANCE
    assert torch.allclose(la(batches[0]), plain(x[:3]))


# --- Monte-Carlo Fisher ----------------------------------------------------------------------------------------------

MC_CASES = {
    "classification": Case(mlp),
    "regression": Case(lambda: mlp(outputs=2), outputs=(2,), likelihood="regression"),
    "positions": Case(mlp, (2, 3), (2, 3)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MC_CASES)
def test_native_mc_depends_on_seed_and_example_alone(name, structure):
    case = MC_CASES[name]
    model, x, y = case.make(n=9)
    of = lambda **kw: curvature(fit(model, case.likelihood, structure, x, y, backend=("native", "mc"), **kw))  # noqa: E731
    whole = of(seed=3, num_samples=2, batch_size=9)
    assert torch.equal(whole, of(seed=3, num_samples=2, batch_size=9))
    for batch_size in (1, 2, 4):
        assert naive.relative_error(of(seed=3, num_samples=2, batch_size=batch_size), whole) < 1e-13
    assert naive.relative_error(of(seed=4, num_samples=2, batch_size=9), whole) > 1e-3


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mc_noise_is_new_in_every_batch(structure):
    """The same example at another index gets other noise, whichever backend draws it."""
    case = MC_CASES["regression"]
    model, x, y = case.make(n=1)
    x, y = x.expand(8, -1), y.expand(8, -1)
    for backend in ("native", "curvlinops"):
        la = fit(model, "regression", structure, x, y, backend=(backend, "mc"), seed=0, batch_size=1)
        one = fit(model, "regression", structure, x[:1], y[:1], backend=(backend, "mc"), seed=0, batch_size=1)
        assert naive.relative_error(curvature(la) / 8, curvature(one)) > 1e-3, backend


@pytest.mark.parametrize("structure", STRUCTURES)
def test_curvlinops_mc_is_reproducible_by_seed(structure):
    case = MC_CASES["classification"]
    model, x, y = case.make(n=6)
    run = lambda seed: curvature(fit(model, "classification", structure, x, y, backend=("curvlinops", "mc"), seed=seed))  # noqa: E731
    assert torch.equal(run(1), run(1))
    assert naive.relative_error(run(2), run(1)) > 1e-3


def test_mc_without_a_seed_follows_the_global_generator():
    case = MC_CASES["classification"]
    model, x, y = case.make(n=6)

    def run(seed):
        torch.manual_seed(seed)
        return fit(model, "classification", "diag", x, y, backend=("native", "mc")).H

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_mc_converges_to_the_ggn_at_the_root_of_the_samples(likelihood, backend, structure):
    """The estimate is a mean of S independent unbiased terms, so its RMS error is exactly proportional to S^-1/2.

    From S to 16 S it falls by 4. The mean square over K seeds of a sum of P squared errors has a relative standard
    deviation of at most about sqrt(2 / K) = 0.22 (one dominant direction, nearly Gaussian), hence 0.11 for its root
    and 0.16 for the ratio of two: a factor of 1.6 either way is three standard deviations. An error that does not fall
    (bias, or noise repeated in every sample) gives a ratio of 1, and one that falls like 1/S gives 16.
    """
    case = MC_CASES[likelihood]
    model, x, y = case.make(n=4)
    exact = curvature(fit(model, likelihood, structure, x, y, batch_size=4))

    def rms(samples):
        errors = []
        for seed in range(40):
            la = fit(
                model,
                likelihood,
                structure,
                x,
                y,
                backend=(backend, "mc"),
                batch_size=4,
                num_samples=samples,
                seed=seed,
            )
            errors.append(naive.relative_error(curvature(la), exact) ** 2)
        return (sum(errors) / len(errors)) ** 0.5

    few, many = rms(4), rms(64)
    assert 4 / 1.6 < few / many < 4 * 1.6
    assert many < 0.3


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "regression", "stride-padding", "sequence", "normed"])
def test_low_precision_models_have_float32_posteriors(name, structure, dtype, tolerance):
    """bfloat16 keeps 8 bits (relative rounding 2^-9 = 0.2 %) through a few layers, squared: a few per cent remain."""
    case = CASES[name]
    model, x, y = case.make(n=6, dtype=dtype)
    la = fit(model, case.likelihood, structure, x, y)
    assert {t.dtype for t in la.sums.tensors.values()} == {torch.float64}
    assert la.sums_spec().torch_dtype is curvature(la).dtype is torch.float32
    assert la.sums.loss.dtype == torch.float64
    exact = fit(
        model.double(),
        case.likelihood,
        structure,
        x if case.vocabulary else x.double(),
        y.double() if case.likelihood == "regression" else y,
    )
    assert naive.relative_error(curvature(la), curvature(exact)) < tolerance


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backend", ["native", "curvlinops"])
def test_labels_of_any_integer_type(backend, structure, dtype):
    case = CASES["mlp"]
    model, x, y = case.make()
    expected = fit(model, "classification", structure, x, y)
    la = fit(model, "classification", structure, x, y.to(dtype), backend=(backend, "ggn"))
    assert naive.relative_error(curvature(la), curvature(expected)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("name", ["mlp", "regression", "stride-padding"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backend", ["native", "curvlinops"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_everything_works_in_bfloat16(subset, backend, structure, name):
    """Weights stay bfloat16; posterior, evidence and predictions are float32, and near those of float64."""
    case = CASES[name]
    model, x, y = case.make(n=6, dtype=torch.bfloat16)
    la = fit(model, case.likelihood, structure, x, y, subset, (backend, "ggn"))
    la.optimize_prior_precision(n_steps=2)
    predictions = [
        la(x),
        la(x, pred_type="nn", link_approx="mc"),
        la.predictive_samples(x),
        la.predictive_samples(x, pred_type="nn"),
        la(x, joint=True) if case.likelihood == "regression" else la(x, link_approx="bridge"),
        la.functional_variance(la.backend.jacobians(x)[0]),
        la.log_prob(la.sample(2)),
        la.log_marginal_likelihood(),
    ]
    for prediction in predictions:
        for value in prediction if isinstance(prediction, tuple) else (prediction,):
            assert torch.isfinite(value).all()
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y), grid_size=3, log_prior_prec_max=1)
    la.prior_precision = 1.0
    again = Laplace(model, case.likelihood, subset, structure)
    again.load_state_dict(la.state_dict())
    y = y.double() if case.likelihood == "regression" else y
    exact = fit(copy.deepcopy(model).double(), case.likelihood, structure, x.double(), y, subset)
    ours, theirs = la(x), exact(x.double())
    if case.likelihood == "regression":
        ours, theirs = ours[1], theirs[1]
    assert ours.dtype == torch.float32
    assert naive.relative_error(ours, theirs) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_used_outside_their_module_are_noticed_in_low_precision(dtype):
    case = CASES["used-outside"]
    model, x, y = case.make(dtype=dtype)
    la = Laplace(model, "classification", "all", "kron")
    la.initialize(x)
    assert tuple(row[0] for row in la.coverage if row[1] == "diag") == case.fallback
