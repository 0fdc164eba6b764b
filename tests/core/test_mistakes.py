"""Everyday mistakes meet one sentence that names the thing and the way out; and what only looks like one works."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, marglik_training
from laplace.capture.feature_extractor import FeatureExtractor
from laplace.curvature import NativeGGN, backend_class
from laplace.data.batches import loss_of
from laplace.enums import Likelihood
from laplace.errors import MissingKeyError
from laplace.likelihoods import Bernoulli, HeteroscedasticGaussian, Poisson, WeightedCategorical
from laplace.utils import _is_batchnorm, fit_diagonal_swag_var, validate
from laplace.utils import utils as upstream

from . import naive
from .models import CASES, Normed, loader, mlp
from .test_uses import Function

FITTABLE = [("all", h) for h in ("full", "kron", "diag", "lowrank", "gp")] + [("last_layer", "kron")]


def fitted(case="mlp", subset="all", structure="kron", **kwargs):
    model, x, y = CASES[case].make(n=6)
    la = Laplace(model, CASES[case].likelihood, subset, structure, **kwargs)
    la.fit(loader(x, y))
    return la, x, y


# --- data ------------------------------------------------------------------------------------------------------------

X, Y = torch.randn(6, 3).double(), torch.randint(3, (6,))
LOADERS = {
    "data set": (TensorDataset(X, Y), "TensorDataset is a data set, .* give DataLoader\\(data_set, batch_size=…\\)"),
    "tensor": (X, "A Tensor of tensors is no loader of batches; give \\[\\(x, y\\)\\]"),
    "batch": ((X, Y), "A tuple of tensors is no loader of batches; give \\[\\(x, y\\)\\]"),
    "nothing": (None, "NoneType is no loader of batches; give a DataLoader"),
    "inputs alone": (DataLoader(X, batch_size=3), "Batch 0 is Tensor; a batch is \\(inputs, targets\\)"),
    "one part": ([(X, Y), (X,)], "Batch 1 is tuple of 1 parts; a batch is"),
    "three parts": ([(X, X, Y)], "Batch 0 is tuple of 3 parts; .* Give further inputs, such as masks, in a dictionary"),
    "numpy targets": ([(X, Y.numpy())], "targets of batch 0 are ndarray, not a tensor; give torch.as_tensor"),
    "list of targets": ([(X, Y.tolist())], "targets of batch 0 are list, not a tensor"),
    "numpy inputs": ([(X.numpy(), Y)], "inputs of batch 0 are ndarray, not a tensor; give torch.as_tensor\\(x\\)"),
    "single examples": ([(X[0], Y[0])], "targets of batch 0 are a tensor without dimensions: a single example"),
    "empty batch": ([(X, Y), (X[:0], Y[:0])], "Batch 1 holds no example; leave empty batches out|inputs of batch 1"),
}


@pytest.mark.parametrize("subset, structure", FITTABLE)
@pytest.mark.parametrize("mistake", LOADERS)
def test_a_fit_says_what_is_wrong_with_its_loader(mistake, subset, structure):
    data, message = LOADERS[mistake]
    la = Laplace(mlp().double(), "classification", subset, structure)
    with pytest.raises(ValueError, match=message):
        la.fit(data)


RATES = {
    "regression": ("regression", 1, Y.double(), r"targets\.unsqueeze\(-1\)\.$"),
    "poisson": (Poisson(), 1, Y, r"targets\.unsqueeze\(-1\)\.$"),
    "heteroscedastic": (HeteroscedasticGaussian(), 2, Y.double(), r"targets\.unsqueeze\(-1\)\.$"),
    "classification": ("classification", 1, Y % 2, r"likelihood=laplace\.likelihoods\.Bernoulli\(\)"),
    "reward_modeling": ("reward_modeling", 1, Y % 2, r"outputs \(6, 2, 1\) .* \.squeeze\(-1\)"),
}


@pytest.mark.parametrize("case", RATES)
def test_targets_without_the_dimension_of_outputs_are_told_what_to_write(case):
    law, outputs, y, message = RATES[case]
    x = torch.stack([X, X + 1], 1) if case == "reward_modeling" else X
    with pytest.raises(ValueError, match=message):
        Laplace(nn.Linear(3, outputs).double(), law, "all", "diag").fit([(x, y)])


@pytest.mark.parametrize(
    "law",
    ["regression", "classification", "reward_modeling", Bernoulli(), Poisson()],
    ids=lambda law: getattr(law, "identity", law),
)
def test_outputs_without_a_dimension_of_their_own_are_refused(law):
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    with pytest.raises(ValueError, match=r"output has shape \(6,\), but has to be \(batch, outputs\).*unsqueeze"):
        Laplace(model, law, "all", "diag").fit([(X, Y)])


def test_binary_labels_of_one_logit_may_stay_without_a_dimension():
    model, y = nn.Linear(3, 1).double(), Y % 2
    fits = [Laplace(model, Bernoulli(), "all", "full") for _ in range(2)]
    for la, targets in zip(fits, (y, y[:, None]), strict=True):
        la.fit([(X, targets)])
    p = model(X).sigmoid().detach()
    js = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    assert naive.relative_error(fits[0].H, (js * p * (1 - p)).T @ js) < 1e-10
    assert torch.equal(fits[0].H, fits[1].H) and fits[0].loss == fits[1].loss


@pytest.mark.parametrize("mistake", ["data set", "numpy targets", "one part"])
def test_so_does_everything_else_that_takes_a_loader(mistake):
    data, message = LOADERS[mistake]
    la, _, _ = fitted()
    for use in (
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=data),
        lambda: validate(la, data, lambda p, y: p.sum()),
        lambda: marglik_training(mlp().double(), data, n_epochs=1),
        lambda: fit_diagonal_swag_var(mlp().double(), data, nn.CrossEntropyLoss(), 1),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_missing_key_is_a_key_error_and_a_value_error():
    la = Laplace(mlp(), "classification", "all", "diag")
    for kind in (KeyError, ValueError, MissingKeyError):
        with pytest.raises(kind) as caught:
            la.fit([{"input_ids": X, "target": Y}])
        assert str(caught.value) == "Dict-like batches need the key 'labels' (dict_key_y), got ['input_ids', 'target']."


def test_the_model_has_to_keep_the_batch_first():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x).mean(0)

    with pytest.raises(ValueError, match=r"Inputs of shape \(6, 3\) give outputs of shape \(3,\): the first dimension"):
        Laplace(Mean(), "regression", "all", "diag").fit([(X.float(), X.float())])


@pytest.mark.parametrize("subset, structure", FITTABLE)
def test_targets_of_a_classifier_that_are_no_labels_say_what_they_look_like(subset, structure):
    onehot = torch.eye(3)[Y]
    la = Laplace(mlp().double(), "classification", subset, structure)
    for targets, message in (
        (onehot, r"Targets of shape \(6, 3\) are one-hot; give the labels, y.argmax\(-1\)"),
        (onehot.long(), "are one-hot"),
        (
            onehot.double().flip(1) + onehot - onehot * onehot.flip(1),
            "hold several labels or none per example.*Bernoulli",
        ),
        (torch.zeros(6, 3).long(), "hold several labels or none per example"),
        (torch.full((6, 3), 1 / 3), "are probabilities of classes; .* takes labels"),
    ):
        with pytest.raises(ValueError, match=message):
            la.fit([(X, targets)])
    with pytest.raises(ValueError, match=r"outputs \(6, 1\) have one logit, .* Return two: torch.cat"):
        Laplace(mlp(outputs=1).double(), "classification", subset, structure).fit([(X, torch.zeros(6).long())])


# --- predictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset, structure", FITTABLE)
def test_a_prediction_says_what_is_wrong_with_its_inputs(subset, structure):
    la, x, _ = fitted(subset=subset, structure=structure)
    uses = [la, la.functional_samples, la.predictive_samples, la._glm_predictive_distribution]
    for use in uses:
        for bad, message in (
            (x[0], r"inputs of this prediction have shape \(3,\): the batch dimension is missing. Give x\[None\]"),
            (x[:0], r"have shape \(0, 3\), which is no example"),
            (x.numpy(), "inputs of this prediction are ndarray, not a tensor"),
        ):
            with pytest.raises(ValueError, match=message):
                use(bad)


@pytest.mark.parametrize("subset, structure", FITTABLE)
def test_inputs_of_another_type_than_the_model_are_refused_as_by_a_fit(subset, structure):
    la, x, y = fitted(subset=subset, structure=structure)
    grid = {"method": "gridsearch", "pred_type": "gp" if structure == "gp" else "glm"}
    uses = [la, la.functional_samples, la.predictive_samples, la._glm_predictive_distribution]
    uses.append(lambda x: la.optimize_prior_precision(val_loader=[(x, y)], **grid))
    uses += [] if structure == "gp" else [lambda x: la(x, pred_type="nn", link_approx="mc")]
    for use in uses:
        with pytest.raises(
            ValueError, match=r"forward pass of this prediction fails in module '.*' \(Linear\): mat1 and mat2"
        ):
            use(x.float())


class Converting(nn.Sequential):
    def forward(self, x):
        return super().forward(x.double())


def test_a_model_that_converts_its_inputs_takes_those_of_another_type():
    model, x, y = CASES["mlp"].make(n=6)
    la = Laplace(Converting(*model).double(), "classification", "all", "kron")
    la.fit([(x, y)])
    assert naive.relative_error(la(x.float()), la(x)) < 1e-6


@pytest.mark.parametrize("n_samples", [0, -1, 2.5, None, True])
def test_a_number_of_samples_is_at_least_one(n_samples):
    la, x, _ = fitted()
    for use in (
        lambda: la.sample(n_samples),
        lambda: la(x, link_approx="mc", n_samples=n_samples),
        lambda: la(x, pred_type="nn", link_approx="mc", n_samples=n_samples),
        lambda: la.predictive_samples(x, n_samples=n_samples),
        lambda: la.functional_samples(x, n_samples=n_samples),
        lambda: la._nn_predictive_samples(x, n_samples=n_samples),
    ):
        with pytest.raises(ValueError, match=f"n_samples={n_samples!r} must be a whole number of at least 1"):
            use()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "1", "much", [1.0, "2"], {}])
@pytest.mark.parametrize("name", ["prior_precision", "prior_mean", "sigma_noise"])
def test_values_that_are_no_numbers_are_named(name, value):
    la, _, _ = fitted("regression")
    message = f"{name}=.* must be a number, or a tensor or list of numbers"
    with pytest.raises(ValueError, match=message):
        Laplace(mlp(), "regression", "all", "kron", **{name: value})
    with pytest.raises(ValueError, match=message):
        Laplace(mlp(), "regression", "last_layer", "kron", **{name: value})
    with pytest.raises(ValueError, match=message):
        setattr(la, name, value)
    for bad in (None, "1"):
        with pytest.raises(ValueError, match="temperature=.* must be positive and finite"):
            la.temperature = bad


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_what_is_no_network_says_how_to_get_one(subset, tmp_path):
    for model, message in (
        ("model.pt", "model='model.pt' is a path. Load the network first: torch.load\\(path, weights_only=False\\)"),
        (tmp_path / "model.pt", "is a path"),
        (mlp().state_dict(), "model is a state dict, not a network: build the network"),
        (torch.relu, "model is builtin_function_or_method, but has to be a torch.nn.Module"),
    ):
        with pytest.raises(ValueError, match=message):
            Laplace(model, "classification", subset, "kron")


def test_what_is_no_state_says_so():
    la, _, _ = fitted()
    for state, message in (
        (la.model.state_dict(), "a state dict of something else, such as a model, not the state of a posterior"),
        (la, "This is KronLaplace, not the state of a posterior; .* is used as it is"),
        (la.model, "This is Sequential, not the state"),
    ):
        with pytest.raises(ValueError, match=message):
            la.load_state_dict(state)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank", "gp"])
def test_requires_grad_that_changes_after_construction_is_named(structure):
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", structure)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad of \['0.weight'\] has changed since this \w+ was made"):
        la.fit(loader(x, y))
    la = Laplace(model, "classification", "all", structure)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"requires_grad of \['0.weight'\] has changed"):
        la.fit(loader(x, y))


def test_many_backward_passes_are_said_once():
    x, y = torch.randn(4, 3), torch.randint(80, (4,))
    la = Laplace(mlp(outputs=80), "classification", "all", "diag")
    with pytest.warns(UserWarning, match="exact GGN of 80 outputs .*'stochastic': True") as caught:
        la.fit(loader(x, y))
    assert len([w for w in caught if "backward passes" in str(w.message)]) == 1


@pytest.mark.filterwarnings("error:The exact GGN")
@pytest.mark.parametrize("subset, kwargs", [("all", {"stochastic": True}), ("last_layer", {})])
def test_few_backward_passes_are_not_mentioned(subset, kwargs):
    x, y = torch.randn(4, 3), torch.randint(80, (4,))
    Laplace(mlp(outputs=80), "classification", subset, "diag", backend_kwargs=kwargs).fit(loader(x, y))


# --- what only looks like a mistake ----------------------------------------------------------------------------------


class Graph:
    """Inputs as of graph libraries: an object that moves itself to a device and has no length."""

    def __init__(self, nodes):
        self.nodes = nodes

    def to(self, device):
        return Graph(self.nodes.to(device))


class OnGraphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, graph):
        return self.net(graph.nodes)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_objects_that_move_themselves_go_to_the_model_as_they_are(subset, structure):
    torch.manual_seed(0)
    model = OnGraphs().double()
    la = Laplace(model, "classification", subset, structure)
    la.fit([(Graph(X[:4]), Y[:4]), (Graph(X[4:]), Y[4:])])
    plain = Laplace(model.net, "classification", subset, structure)
    plain.fit([(X, Y)])
    assert torch.allclose(la(Graph(X)), plain(X))
    la.optimize_prior_precision(method="gridsearch", val_loader=[(Graph(X), Y)], grid_size=3)


@pytest.mark.parametrize("structure", ["gp"])
def test_a_gp_draws_functions_under_the_name_of_the_linearised_network(structure):
    la, x, _ = fitted(structure=structure)
    for draw in (la.functional_samples, la.predictive_samples):
        one, two = (draw(x, kind, 5, generator=torch.Generator().manual_seed(0)) for kind in ("glm", "gp"))
        assert torch.equal(one, two)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_names_that_public_scripts_call(structure):
    la, x, _ = fitted("regression", structure=structure)
    for value, truth in zip(la._glm_predictive_distribution(x), la(x), strict=True):
        assert torch.equal(value, truth)
    assert la._glm_predictive_distribution(x, diagonal_output=True)[1].shape == (6, 2)
    assert la._glm_predictive_distribution(x, joint=True)[1].shape == (12, 12)
    la, x, _ = fitted(structure=structure)
    f, variance = la._glm_predictive_distribution(x)  # of logits
    assert torch.allclose(f, la.model(x))
    assert variance.shape == (6, 3, 3)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    draws = la._nn_predictive_samples(x, 7, generators[0])
    assert torch.equal(draws, la.predictive_samples(x, "nn", 7, generator=generators[1]))
    assert torch.allclose(draws.sum(-1), torch.ones(7, 6).double())
    assert upstream._is_batchnorm is _is_batchnorm
    assert [_is_batchnorm(m) for m in (nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.LayerNorm(2))] == [True, True, False]


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_backpack_takes_inputs_that_require_gradients(structure):
    """As in Bayesian optimisation; what it lacks are derivatives in inputs, which nobody asked for."""
    model, x, y = CASES["mlp"].make()
    backend = backend_class("backpack")[0](model, "classification")
    truth = getattr(NativeGGN(model, "classification"), structure)
    options = {"N": 5} if structure == "kron" else {}
    found = getattr(backend, structure)(x.clone().requires_grad_(), y, **options)[1]
    found, truth = (h.to_matrix() if structure == "kron" else h for h in (found, truth(x, y, **options)[1]))
    assert naive.relative_error(found, truth) < 1e-9
    js, _ = backend.jacobians(x.clone().requires_grad_())
    assert naive.relative_error(js, naive.jacobians(model, x)) < 1e-9


def test_features_of_an_unreduced_model_are_reduced_without_a_layer_s_name():
    x = torch.randn(6, 7, 8, 9, 4)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
    features = model[:2](x).flatten(1, -2)
    for reduction, truth in (
        ("pick_first", features[:, 0]),
        ("pick_last", features[:, -1]),
        ("average", features.mean(1)),
    ):
        out, found = FeatureExtractor(model, feature_reduction=reduction).forward_with_features(x)
        assert (out.shape, found.shape) == ((6, 7, 8, 9, 3), (6, 10))
        assert torch.allclose(found, truth)
        la = Laplace(model, "classification", "last_layer", "diag", feature_reduction=reduction)
        with pytest.raises(
            ValueError, match="is not the output of its last layer"
        ):  # a posterior needs the reduced model
            la.fit([(x, torch.randint(3, (6, 7, 8, 9)))])


def test_normed_models_and_ordered_dicts_are_what_they_are():
    assert isinstance(Normed().state_dict(), OrderedDict)
    assert Laplace(Normed(), Likelihood.CLASSIFICATION, "all", "diag").n_params > 0


class NextWord(nn.Module):
    """Logits of the next word at every position."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, batch):
        return self.head(self.table(batch["input_ids"]))


@pytest.mark.parametrize("shifted", [False, True])
def test_labels_that_are_the_input_words_are_noticed(shifted):
    words = torch.randint(1, 7, (4, 5), generator=torch.Generator().manual_seed(0))
    labels = words.roll(-1, 1) if shifted else words.clone()
    labels[1, 3:] = -100
    la = Laplace(NextWord(), WeightedCategorical(ignore_index=-100), "all", "diag")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        la.fit([{"input_ids": words, "labels": labels}])
    said = [str(w.message) for w in found if "The labels are the input words themselves" in str(w.message)]
    assert len(said) == (0 if shifted else 1)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 1), (4, 3, 5, 2)])
def test_classes_in_the_second_dimension_are_named(shape):
    """As torch's losses have them: segmentation models, sequences."""
    model = nn.Sequential(nn.Linear(2, torch.Size(shape[1:]).numel()), nn.Unflatten(1, shape[1:]))
    y = torch.randint(3, (4, *shape[2:]))
    with pytest.raises(
        ValueError, match=r"classes in the second dimension.* end the model's forward with .movedim\(1, -1\)"
    ):
        Laplace(model, "classification", "all", "diag").fit([(torch.randn(4, 2), y)])


def test_a_loss_that_takes_other_arguments_is_told_which_it_is_given():
    la, x, y = fitted("regression", structure="diag")
    with pytest.raises(ValueError, match="loss=MSELoss does not take the 3 arguments .*, means, variances and targets"):
        la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y), loss=nn.MSELoss())
    with pytest.raises(ValueError, match="loss=MSELoss does not take the 3 arguments"):
        validate(la, loader(x, y), nn.MSELoss())
    assert validate(la, loader(x, y), lambda mean, variance, y: nn.MSELoss()(mean, y)) > 0


def test_a_loss_without_a_signature_is_called():
    assert loss_of(torch.dist, [(torch.zeros(2), torch.ones(2)), (torch.zeros(2), torch.ones(2))]) == 2


ENDS = {
    "softmax": ("classification", lambda f: f.softmax(-1), Y, "are probabilities: they sum to 1 over the classes"),
    "softmax by hand": ("classification", lambda f: f.exp() / f.exp().sum(-1, keepdim=True), Y, "are probabilities"),
    "sigmoid": (Bernoulli(), lambda f: f[:, :1].sigmoid(), Y % 2, "ends in a sigmoid, but the likelihood takes logits"),
    "exp": (Poisson(), lambda f: f[:, None].exp()[:, 0], torch.ones(6, 3), "ends in an exponential.* takes log rates"),
    "log_softmax": ("classification", lambda f: f.log_softmax(-1), Y, None),
    "logits": (Bernoulli(), lambda f: f[:, :1], Y % 2, None),
    "dead logits in half precision": ("classification", lambda f: 0 * f.bfloat16().repeat(1, 20) + 0.01, Y, None),
}


class Ends(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.layer, self.end = nn.Linear(3, 3).double(), end

    def forward(self, x):
        return self.end(self.layer(x))


@pytest.mark.parametrize("name", ENDS)
def test_a_model_that_ends_in_what_its_likelihood_applies_itself_is_said(name, recwarn):
    likelihood, end, y, message = ENDS[name]
    Laplace(Ends(end), likelihood, "all", "diag").fit([(X, y)])
    said = [str(w.message) for w in recwarn if w.category is UserWarning]
    assert not said if message is None else re.search(message, said[0]) and len(said) == 1


def test_memory_that_runs_out_is_not_said_to_be_the_models_fault():
    """Those who halve a batch know it by its class."""

    def full(f):
        if len(f) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return f

    la = Laplace(Ends(full), "classification", "all", "diag")
    la.fit([(X, Y)])
    for how in ({}, {"pred_type": "nn", "link_approx": "mc"}):
        with pytest.raises(torch.OutOfMemoryError):
            la(torch.cat([X, X]), **how)


@pytest.mark.parametrize("subset, structure", FITTABLE)
def test_batches_that_the_model_cannot_run_are_said_with_the_module(subset, structure):
    la, x, y = fitted(subset=subset, structure=structure)
    message = r"forward pass of (this|the first) batch fails in module '(model.)?0' \(Linear\)"
    for wrong in (x[:, :2], x.long(), [[1.0, 2.0, 3.0]]):
        with pytest.raises(ValueError, match=message):
            la(wrong)
    with pytest.raises(ValueError, match=message):
        la.fit([(x, y), (x[:, :2], y)])
    if structure != "gp":
        with pytest.raises(ValueError, match=message):
            la(x[:, :2], pred_type="nn", link_approx="mc")


@pytest.mark.parametrize("subset, structure", FITTABLE[-2:])
def test_a_model_without_parameters_has_nothing_to_infer(subset, structure):
    with pytest.raises(ValueError, match=r"The model \(ReLU\) has no parameters, so there is nothing to infer"):
        Laplace(nn.ReLU(), "classification", subset, structure)


UNUSABLE = {
    "meta": (
        lambda: nn.Linear(3, 2, device="meta"),
        "weight, bias are on torch's meta device, where they have no values",
    ),
    "sparse": (lambda: Function(None, weight=torch.eye(3).to_sparse()), "weight are sparse tensors.* Keep them dense"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_parameters_without_values_or_dense_ones_are_named(name):
    made, message = UNUSABLE[name]
    with pytest.raises(ValueError, match=message):
        Laplace(made(), "regression", "all", "diag")


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_complex_outputs_are_refused(subset):
    class Spectrum(nn.Linear):
        def forward(self, x):
            return torch.fft.fft(super().forward(x))

    la = Laplace(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Spectrum(4, 2)), "regression", subset, "full")
    with pytest.raises(ValueError, match=r"output is of torch.complex64, .* torch.view_as_real"):
        la.fit([(torch.randn(5, 3), torch.randn(5, 2))])
