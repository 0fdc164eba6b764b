"""Bad input: errors that name the value, the valid choices and the examples; an earlier fit stays as it was."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from laplace import Laplace, NonFiniteError, NotFittedError, marglik_training
from laplace.curvature import backend_class, backend_names
from laplace.curvature.curvature import GGNInterface

from .models import CASES, loader, mlp
from .posteriors import SIX, fitted

NAN = float("nan")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("classify",),
            "likelihood='classify' is unknown; valid values are 'regression', 'classification', 'reward_modeling'",
        ),
        (
            ("classification", "some"),
            "subset_of_weights='some' is unknown; valid values are 'all', 'last_layer', 'subnetwork'",
        ),
        (
            ("classification", "all", "block"),
            "valid values are 'full', 'kron', 'ekfac', 'diag', 'blockdiag', 'lowrank', 'gp'",
        ),
        (
            ("classification", "subnetwork", "gp"),
            "no Laplace approximation for subnetwork × gp; available are all × full, all × kron",
        ),
        (("classification", "last_layer", "lowrank"), "no Laplace approximation for last_layer × lowrank; available"),
        (("classification", "subnetwork", "kron"), "no Laplace approximation for subnetwork × kron; available"),
    ],
)
def test_unknown_names_list_the_valid_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        Laplace(mlp(), *arguments)


def test_backends_are_found_by_name():
    assert set(backend_names()) >= {"native", "curvlinops"}
    assert backend_class("native", "mc")[1] == {"stochastic": True}
    assert backend_class("native", "ef")[0].__name__ == "NativeEF"
    with pytest.raises(ValueError, match="backend='jax' is unknown; valid backends are 'native', 'curvlinops'"):
        backend_class("jax")
    with pytest.raises(ValueError, match="estimator='hessian' is unknown; valid estimators are 'ggn', 'mc', 'ef'"):
        backend_class("native", "hessian")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        getattr(__import__("laplace.curvature").curvature, "Nothing")  # noqa: B009
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        GGNInterface(mlp(), "classification", num_samples=0)


# --- targets and data ------------------------------------------------------------------------------------------------

BACKENDS = [("native", "ggn"), ("native", "mc"), ("native", "ef"), ("curvlinops", "ggn"), ("curvlinops", "ef")]


def laplace_of(case, structure, backend, estimator="ggn", subset="all"):
    model, x, y = CASES[case].make(n=6)
    cls, kwargs = backend_class(backend, estimator)
    return Laplace(model, CASES[case].likelihood, subset, structure, backend=cls, backend_kwargs=kwargs), x, y


def spoil(values, *indices, by=NAN):
    values = values.clone()
    for i in indices:
        values[i] = by
    return values


@pytest.mark.parametrize("backend, estimator", BACKENDS)
@pytest.mark.parametrize("subset, structure", SIX)
def test_bad_targets_and_data_name_the_example_and_keep_the_fit(subset, structure, backend, estimator):
    la, x, y = laplace_of("mlp", structure, backend, estimator, subset)
    la.fit(loader(x, y))
    kept, before = la.sums, la(x)
    for bad_x, bad_y, kind, message in (
        (x, spoil(y, 3, by=3), ValueError, "Label 3 of example 3 is out of range: the model has 3 outputs.* 0…2"),
        (x, spoil(y, 4, by=-1), ValueError, "Label -1 of example 4 is out of range"),
        (x, y.double(), ValueError, "integer class labels, but the targets are torch.float64"),
        (x, y.bool(), ValueError, "integer class labels, but the targets are torch.bool"),
        (x, y[:, None], ValueError, r"Labels of shape \(2, 1\) do not match outputs \(2, 3\)"),
        (spoil(x, 3, 5), y, NonFiniteError, r"output is NaN or Inf for 1 example\(s\): indices 3"),
    ):
        with pytest.raises(kind, match=message):
            la.fit(loader(bad_x, bad_y))
    for override in (True, False):
        with pytest.raises(ValueError, match="empty.*earlier fit stays"):
            la.fit([], override=override)
    assert la.sums is kept
    assert la.n_data == 6
    assert torch.equal(la(x), before)


@pytest.mark.parametrize("backend, estimator", BACKENDS)
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_non_finite_values_name_global_indices_and_add_nothing(structure, backend, estimator):
    la, x, y = laplace_of("regression", structure, backend, estimator)
    la.initialize(x)
    sums = la.zero_sums()
    la.accumulate(sums, x, y, offset=0)
    before = {name: value.clone() for name, value in sums.to_tensors().items()}
    for bad_x, bad_y, what in (
        (spoil(x, 1, 4), y, "model's output"),
        (spoil(x, 1, 4, by=float("inf")) * 0, y, "model's output"),
        (x, spoil(y, 1, 4), "regression target"),
        (x, spoil(y, 1, 4, by=-float("inf")), "regression target"),
    ):
        with pytest.raises(NonFiniteError, match=f"{what} is NaN or Inf for 2 example.*indices 1001, 1004") as caught:
            la.accumulate(sums, bad_x, bad_y, offset=1000)
        assert caught.value.examples == [1001, 1004]
        assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match=r"Targets of shape \(6,\) do not match outputs of shape \(6, 2\)"):
        la.accumulate(sums, x, y[:, 0], offset=0)
    assert sums.n_data == 6
    assert all(torch.equal(before[name], value) for name, value in sums.to_tensors().items())


def test_a_user_backend_names_global_indices_too():
    model, x, y = CASES["mlp"].make(n=6)
    la = Laplace(model, "classification", "all", "diag", backend=GGNInterface)
    with pytest.raises(ValueError, match="Label 9 of example 5"):
        la.fit(loader(x, spoil(y, 5, by=9)))
    with pytest.raises(NonFiniteError, match="indices 4"):
        la.fit(loader(spoil(x, 4), y))


def test_errors_survive_pickle():
    error = pickle.loads(pickle.dumps(NonFiniteError("The output", range(5, 25))))
    assert error.examples == list(range(5, 25))
    assert "20 example(s): indices 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, …" in str(error)


def test_large_finite_outputs_are_not_refused():
    """The sum of a batch may overflow although every value is finite."""
    la = Laplace(nn.Linear(1, 1, bias=False), "regression", "all", "diag")
    x = torch.full((4, 1), 1e38)
    with torch.no_grad():
        la.model.weight.fill_(1.0)
    from laplace.likelihoods.base import check_finite

    check_finite("values", x * 3, 0)
    with pytest.raises(NonFiniteError):
        check_finite("values", x * 10, 0)


def test_dict_batches_need_the_key_of_the_targets():
    la, x, y = laplace_of("mlp", "diag", "native")
    with pytest.raises(ValueError, match=r"need the key 'labels' \(dict_key_y\), got \['input_ids', 'target'\]"):
        la.fit([{"input_ids": x, "target": y}])


# --- hyperparameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, float("inf"), [1.0, -2.0, 1.0, 1.0]])
def test_prior_precision_must_be_positive(value):
    wrong = value[1] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=f"prior_precision must be positive and finite, but holds {wrong}"):
        Laplace(mlp(), "classification", "all", "diag", prior_precision=torch.as_tensor(value))
    la = fitted(structure="diag")
    with pytest.raises(ValueError, match="positive and finite"):
        la.prior_precision = torch.as_tensor(value)
    assert la.prior_precision.tolist() == [1.0]


@pytest.mark.parametrize("shape", [(3,), (2, 2), (0,), (1, 1)])
def test_prior_precision_of_another_shape_is_refused(shape):
    message = r"valid are a scalar, 4 values \(one per parameter tensor\) or 31 values"
    with pytest.raises(ValueError, match=message):
        Laplace(mlp(), "classification", "all", "full", prior_precision=torch.ones(shape))
    with pytest.raises(ValueError, match=message):
        fitted(structure="full").prior_precision = torch.ones(shape)


def test_prior_mean_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"prior_mean has shape \(3,\); valid are a scalar or \(31,\)"):
        fitted().prior_mean = torch.zeros(3)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_kron_refuses_a_diagonal_prior(subset):
    la = fitted(subset, "kron")
    with pytest.raises(ValueError, match="Kron takes a scalar or layerwise .* not a diagonal one"):
        la.prior_precision = torch.ones(la.n_params)


def test_last_layer_checks_a_prior_given_before_the_layer_is_known():
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "last_layer", "full", prior_precision=torch.ones(15))
    la.fit(loader(x, y))
    assert len(la.prior_precision) == 15
    la = Laplace(model, "classification", "last_layer", "kron", prior_precision=torch.ones(15))
    with pytest.raises(ValueError, match="not a diagonal one"):
        la.fit(loader(x, y))


@pytest.mark.parametrize(
    "value, message",
    [
        (0.0, "sigma_noise must be positive and finite, but is 0.0"),
        (-1.0, "must be positive"),
        (NAN, "must be positive"),
        (torch.ones(2), r"sigma_noise must be a scalar, but has shape \(2,\)"),
    ],
)
def test_sigma_noise_must_be_a_positive_scalar(value, message):
    with pytest.raises(ValueError, match=message):
        Laplace(mlp(), "regression", "all", "diag", sigma_noise=value)


def test_sigma_noise_is_for_regression():
    with pytest.raises(ValueError, match="sigma_noise=0.5 has no meaning for classification; it must be 1"):
        Laplace(mlp(), "classification", "all", "diag", sigma_noise=0.5)
    with pytest.raises(ValueError, match="no meaning for classification"):
        fitted().log_marginal_likelihood(sigma_noise=torch.tensor(2.0))


@pytest.mark.parametrize("value", [0, -1.0, NAN])
def test_temperature_must_be_positive(value):
    with pytest.raises(ValueError, match="temperature=.* must be positive"):
        Laplace(mlp(), "classification", "all", "diag", temperature=value)
    with pytest.raises(ValueError, match="temperature=.* must be positive"):
        fitted().temperature = value


def test_python_numbers_keep_double_precision():
    la = fitted("all", "full", "regression", prior_precision=0.1, prior_mean=0.3, sigma_noise=0.7)
    assert (la.prior_precision.item(), la.prior_mean.item(), la.sigma_noise.item()) == (0.1, 0.3, 0.7)


# --- order of calls, models ------------------------------------------------------------------------------------------

BEFORE_FIT = {
    "call": lambda la, x: la(x),
    "predictive": lambda la, x: la.predictive(x, "glm", "probit", 10),
    "predictive_samples": lambda la, x: la.predictive_samples(x),
    "functional_samples": lambda la, x: la.functional_samples(x),
    "gridsearch": lambda la, x: la.optimize_prior_precision(method="gridsearch", val_loader=[(x, x)]),
    "sample": lambda la, x: la.sample(2),
    "evidence": lambda la, x: la.log_marginal_likelihood(),
    "log_likelihood": lambda la, x: la.log_likelihood,
    "posterior_precision": lambda la, x: la.posterior_precision,
    "state_dict": lambda la, x: la.state_dict(),
    "tuning": lambda la, x: la.optimize_prior_precision(),
    "coverage": lambda la, x: la.coverage,
    "zero_sums": lambda la, x: la.zero_sums(),
}


@pytest.mark.parametrize("subset, structure", SIX)
@pytest.mark.parametrize("name", [n for n in BEFORE_FIT])
def test_calls_before_fit(name, subset, structure):
    if name == "log_prob" and subset == "last_layer":
        subset = "all"  # the parameter vector of an unknown layer does not exist to be evaluated at
    model, x, _ = CASES["mlp"].make()
    la = Laplace(model, "classification", subset, structure)
    with pytest.raises(NotFittedError, match=r"fit\(train_loader\)"):
        BEFORE_FIT[name](la, x)


@pytest.mark.parametrize("structure", ["lowrank", "gp", "subnetwork"])
@pytest.mark.parametrize(
    "name", ["call", "predictive_samples", "functional_samples", "evidence", "log_likelihood", "state_dict"]
)
def test_calls_before_fit_of_the_other_posteriors(name, structure):
    model, x, _ = CASES["mlp"].make()
    if structure == "subnetwork":
        la = Laplace(model, "classification", "subnetwork", "diag", subnetwork_indices=torch.tensor([1, 4]))
    else:
        la = Laplace(model, "classification", "all", structure)
    with pytest.raises(NotFittedError, match=r"fit\(train_loader\)"):
        BEFORE_FIT[name](la, x)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank", "gp"])
def test_gradients_that_were_switched_after_the_fit_are_named(structure):
    """The posterior is over what had gradients then; over other parameters its numbers would mean nothing."""
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", structure)
    la.fit(loader(x, y))
    before = la(x)
    model[0].bias.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"requires_grad of \['0.bias'\] has changed since the fit: .* over 4 .* now has 3"
    ):
        la(x)
    model[0].bias.requires_grad_(True)
    assert torch.equal(la(x), before)


def test_sums_that_do_not_fit_are_refused():
    la, other, x = fitted(structure="kron"), fitted(structure="diag"), CASES["mlp"].make()[1]
    before = la(x)
    with pytest.raises(ValueError, match="hold no example"):
        la.set_sums(la.zero_sums())
    with pytest.raises(ValueError, match="structure 'diag' .* do not fit this 'kron' posterior"):
        la.set_sums(other.sums)
    with pytest.raises(ValueError, match="do not fit"):
        la.set_sums(fitted("last_layer", "kron").sums)
    sums = fitted(structure="kron").sums
    sums.tensors["0.weight/A"][0, 0] = NAN
    with pytest.raises(ValueError, match=r"NaN or Inf in \['0.weight/A'\]"):
        la.set_sums(sums)
    assert torch.equal(la(x), before)


def test_models_without_trainable_parameters():
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        Laplace(mlp().requires_grad_(False), "classification", "all", "full")
    model, x, y = CASES["mlp"].make()
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match="last layer '2' has no parameter with requires_grad=True"):
        Laplace(model, "classification", "last_layer", "full").fit(loader(x, y))


class Unused(nn.Module):
    """Has a layer that does not influence the output."""

    def __init__(self):
        super().__init__()
        self.used, self.ignored = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        self.ignored(x)
        return self.used(x)


def test_layers_that_do_not_matter_are_reported_or_have_zero_curvature():
    torch.manual_seed(0)
    model, (_, x, y) = Unused().double(), CASES["mlp"].make()
    la = Laplace(model, "classification", "all", "diag")
    with pytest.raises(ValueError, match="'ignored' does not influence the model's output.*requires_grad=False"):
        la.fit(loader(x, y))
    model.ignored.requires_grad_(False)
    la = Laplace(model, "classification", "all", "diag")
    la.fit(loader(x, y))
    assert la.n_params == 12


def test_a_module_that_did_not_run_is_reported_and_has_zero_curvature():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model, (_, x, y) = Spare().double(), CASES["mlp"].make()
    for structure in ("full", "kron", "diag"):
        la = Laplace(model, "classification", "all", structure)
        la.fit(loader(x, y))
        assert "did not run" in str(la.coverage)
        whole = la.H_facs.to_matrix() if structure == "kron" else la.H
        h = whole.diagonal() if whole.ndim == 2 else whole
        assert float(h[12:].abs().max()) == 0
        assert float(h[:12].min()) > 0


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), r"ran last is '1' \(Softmax\), not nn.Linear"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), r"'1' \(ReLU\), not nn.Linear"),
    ],
)
def test_last_layer_must_be_linear(model, message):
    _, x, y = CASES["mlp"].make()
    la = Laplace(model.double(), "classification", "last_layer", "kron")
    model.train()
    with pytest.raises(ValueError, match=message):
        la.fit(loader(x, y))
    assert all(module.training for module in model.modules()), "left as it was found"


class Scaled(nn.Module):
    """Changes the last layer's output afterwards."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return 2 * self.last(x)


@pytest.mark.parametrize("name", [None, "last"])
def test_the_last_layer_s_output_must_be_the_model_s(name):
    _, x, y = CASES["mlp"].make()
    la = Laplace(Scaled().double(), "classification", "last_layer", "kron", last_layer_name=name)
    with pytest.raises(ValueError, match="is not the output of its last layer 'last'.*feature_reduction.*'all'"):
        la.fit(loader(x, y))


def test_last_layer_by_name():
    model, x, y = CASES["mlp"].make()
    named = Laplace(model, "classification", "last_layer", "kron", last_layer_name="2")
    named.fit(loader(x, y))
    assert torch.equal(named(x), fitted("last_layer", "kron")(x))
    with pytest.raises(ValueError, match=r"last_layer_name='head' is not a module; linear modules are \['0', '2'\]"):
        Laplace(model, "classification", "last_layer", "kron", last_layer_name="head")
    with pytest.raises(ValueError, match="'1' is Tanh"):
        Laplace(model, "classification", "last_layer", "kron", last_layer_name="1")


class TakesOne(nn.Module):
    """Per-token logits of which one position, or the mean, is returned."""

    def __init__(self, how):
        super().__init__()
        self.token, self.last, self.how = nn.Linear(3, 4), nn.Linear(4, 3), how

    def forward(self, x):
        z = self.last(torch.tanh(self.token(x)))
        return {"pick_first": z[:, 0], "pick_last": z[:, -1], "average": z.mean(1)}[self.how]


@pytest.mark.parametrize("how", ["pick_first", "pick_last", "average"])
def test_feature_reduction_repeats_what_the_model_does(how):
    torch.manual_seed(0)
    model, x, y = TakesOne(how).double(), torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(3, (5,))
    with pytest.raises(ValueError, match="feature_reduction .'pick_first', 'pick_last', 'average'"):
        Laplace(model, "classification", "last_layer", "full").fit(loader(x, y))
    la = Laplace(model, "classification", "last_layer", "full", feature_reduction=how)
    la.fit(loader(x, y))
    h = torch.tanh(model.token(x)).detach()
    features = {"pick_first": h[:, 0], "pick_last": h[:, -1], "average": h.mean(1)}[how]
    plain = Laplace(model.last, "classification", "all", "full")
    plain.fit(loader(features, y))
    assert torch.allclose(la.H, plain.H)
    assert torch.allclose(la(x), plain(features))
    with pytest.raises(ValueError, match="feature_reduction='max' is unknown; valid values are 'pick_first'"):
        Laplace(model, "classification", "last_layer", "full", feature_reduction="max")


def test_a_joint_predictive_is_gaussian_and_whole():
    la, x = fitted("all", "diag", "regression"), CASES["regression"].make()[1]
    with pytest.raises(ValueError, match="joint=True is the covariance of a Gaussian"):
        la(x, joint=True, pred_type="nn", link_approx="mc")
    for value, truth in zip(la(x, joint=True, diagonal_output=True), la(x, joint=True), strict=True):
        assert torch.equal(value, truth)


def test_a_refused_state_leaves_the_last_layer_to_be_found():
    state = fitted("last_layer", "kron").state_dict()
    model = CASES["mlp"].make(seed=1)[0]
    la = Laplace(model, "classification", "last_layer", "kron")
    with pytest.raises(ValueError, match="fitted at other parameters"):
        la.load_state_dict(state)
    assert la.model.last_layer_name is None and la.params == []


@pytest.mark.parametrize("structure", ["gp", "lowrank"])
def test_marglik_training_of_what_is_no_sum(structure):
    model, x, y = CASES["regression"].make()
    with pytest.raises(ValueError, match=f"hessian_structure='kron', 'diag' or 'full', not '{structure}'"):
        marglik_training(model, loader(x, y), "regression", structure, n_epochs=1)
