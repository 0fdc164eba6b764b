"""The documented surface: every class, method, attribute and keyword argument is there under its documented name."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import torch

import laplace
from laplace import Laplace
from laplace.curvature import NativeEF
from laplace.utils import FeatureExtractor

from .models import CASES, loader

HEAD = "model likelihood"
PRIOR = "sigma_noise=1.0 prior_precision=1.0 prior_mean=0.0 temperature=1.0"
KEYS = "dict_key_x='input_ids' dict_key_y='labels'"
TAIL = "backend_kwargs=None asdl_fisher_kwargs=None"
BASE = f"{HEAD} {PRIOR} enable_backprop=False {KEYS} backend=None {TAIL}"
KRON = f"{HEAD} {PRIOR} enable_backprop=False {KEYS} backend=None damping=False {TAIL}"
REDUCED = f"{PRIOR} enable_backprop=False feature_reduction=None {KEYS} backend=None last_layer_name=None"
LAST = f"{HEAD} {REDUCED} {TAIL}"
SUBNET = f"{HEAD} subnetwork_indices {PRIOR} backend=None {TAIL}"
GP = "backend_kwargs=None independent_outputs=False seed=0"
NO_SUBNET = f"{HEAD} last_layer=False {KEYS}"
CURVATURE = f"{HEAD} last_layer=False subnetwork_indices=None {KEYS}"
GGN = f"{CURVATURE} stochastic=False"
TUNE = (
    "pred_type='glm' method='marglik' n_steps=100 lr=0.1 init_prior_prec=1.0 prior_structure='scalar' val_loader=None "
    "loss=None log_prior_prec_min=-4 log_prior_prec_max=4 grid_size=100 link_approx='probit' n_samples=100 verbose=False "
    "progress_bar=False log_prior_prec_base=10.0"
)
MARGLIK = (
    "model train_loader likelihood='classification' hessian_structure='kron' backend optimizer_cls optimizer_kwargs=None "
    "scheduler_cls=None scheduler_kwargs=None n_epochs=300 lr_hyp=0.1 prior_structure='layerwise' n_epochs_burnin=0 "
    "n_hypersteps=10 marglik_frequency=1 prior_prec_init=1.0 sigma_noise_init=1.0 temperature=1.0 fix_sigma_noise=False "
    f"progress_bar=False enable_backprop=False {KEYS}"
)

# Dotted name -> documented parameters in their order, with their documented defaults.
CALLABLES = {
    "laplace.Laplace": f"{HEAD} subset_of_weights='last_layer' hessian_structure='kron'",
    "laplace.marglik_training": MARGLIK,
    "laplace.BaseLaplace": BASE,
    "laplace.ParametricLaplace": BASE,
    "laplace.FullLaplace": BASE,
    "laplace.KronLaplace": KRON,
    "laplace.EKFACLaplace": BASE,
    "laplace.BlockDiagLaplace": BASE,
    "laplace.DiagLaplace": BASE,
    "laplace.LowRankLaplace": BASE.replace("backend=None", "backend"),
    "laplace.FunctionalLaplace": f"{HEAD} n_subset {PRIOR} enable_backprop=False {KEYS} backend=None {GP}",
    "laplace.FunctionalLLLaplace": f"{HEAD} n_subset {REDUCED} {GP}",
    "laplace.LLLaplace": LAST,
    "laplace.FullLLLaplace": LAST,
    "laplace.KronLLLaplace": f"{HEAD} {REDUCED} damping=False {TAIL}",
    "laplace.EKFACLLLaplace": LAST,
    "laplace.DiagLLLaplace": LAST,
    "laplace.SubnetLaplace": SUBNET,
    "laplace.FullSubnetLaplace": SUBNET,
    "laplace.DiagSubnetLaplace": SUBNET,
    "laplace.baselaplace.KronLaplace": KRON,
    "laplace.lllaplace.DiagLLLaplace": LAST,
    "laplace.subnetlaplace.FullSubnetLaplace": SUBNET,
    "laplace.curvature.CurvatureInterface": CURVATURE,
    "laplace.curvature.GGNInterface": f"{GGN} num_samples=1",
    "laplace.curvature.EFInterface": CURVATURE,
    "laplace.curvature.NativeGGN": f"{GGN} num_samples=1",
    "laplace.curvature.NativeEF": CURVATURE,
    "laplace.curvature.BackPackInterface": CURVATURE,
    "laplace.curvature.BackPackGGN": GGN,
    "laplace.curvature.BackPackEF": CURVATURE,
    "laplace.curvature.AsdlInterface": CURVATURE,
    "laplace.curvature.AsdlGGN": GGN,
    "laplace.curvature.AsdlEF": NO_SUBNET,
    "laplace.curvature.AsdlHessian": NO_SUBNET,
    "laplace.curvature.CurvlinopsInterface": CURVATURE,
    "laplace.curvature.CurvlinopsGGN": GGN,
    "laplace.curvature.CurvlinopsEF": CURVATURE,
    "laplace.curvature.CurvlinopsHessian": CURVATURE,
    "laplace.curvature.asdfghjkl.AsdfghjklGGN": GGN,
    "laplace.curvature.asdfghjkl.AsdfghjklEF": NO_SUBNET,
    "laplace.curvature.asdfghjkl.AsdfghjklHessian": NO_SUBNET,
    "laplace.curvature.asdl.AsdlGGN": GGN,
    "laplace.curvature.backpack.BackPackGGN": GGN,
    "laplace.curvature.curvature.CurvatureInterface": CURVATURE,
    "laplace.curvature.curvlinops.CurvlinopsGGN": GGN,
    "laplace.transforms.dense_ggn.build": "forward outer_log_likelihood init_prec=0.0",
    "laplace.transforms.dense_ggn.init": "params init_prec=0.0",
    "laplace.transforms.dense_ggn.update": "state batch forward outer_log_likelihood inplace=False",
    "laplace.transforms.dense_ggn.sample": "state sample_shape",
    "laplace.transforms.dense_ggn.DenseLaplaceState": "params prec aux",
    "laplace.utils.LargestMagnitudeSubnetMask": "model n_params_subnet",
    "laplace.utils.RandomSubnetMask": "model n_params_subnet",
    "laplace.utils.LargestVarianceDiagLaplaceSubnetMask": "model n_params_subnet diag_laplace_model",
    "laplace.utils.LargestVarianceSWAGSubnetMask": "model n_params_subnet",
    "laplace.utils.ParamNameSubnetMask": "model parameter_names",
    "laplace.utils.ModuleNameSubnetMask": "model module_names",
    "laplace.utils.LastLayerSubnetMask": "model last_layer_name=None",
    "laplace.utils.subnetmask.SubnetMask": "model",
    "laplace.utils.feature_extractor.FeatureExtractor": (
        "model last_layer_name=None enable_backprop=False feature_reduction=None"
    ),
}

SAMPLES = "x pred_type='glm' n_samples=100 diagonal_output=False generator=None"
CALL = "pred_type joint=False link_approx='probit' n_samples=100 diagonal_output=False generator=None fitting=False"
# Class -> method -> documented parameters after self.
METHODS = {
    "laplace.BaseLaplace": {
        "fit": "train_loader",
        "log_marginal_likelihood": "prior_precision=None sigma_noise=None",
        "predictive": "x pred_type link_approx n_samples",
        "optimize_prior_precision": TUNE,
    },
    "laplace.ParametricLaplace": {
        "__call__": f"x {CALL}",
        "fit": "train_loader override=True progress_bar=False",
        "square_norm": "value",
        "log_prob": "value normalized=True",
        "log_marginal_likelihood": "prior_precision=None sigma_noise=None",
        "predictive": "x pred_type link_approx n_samples",
        "predictive_samples": SAMPLES,
        "functional_variance": "Js",
        "functional_covariance": "Js",
        "functional_samples": SAMPLES,
        "sample": "n_samples=100 generator=None",
        "optimize_prior_precision": TUNE,
        "state_dict": "",
        "load_state_dict": "state_dict",
    },
    "laplace.LLLaplace": {"fit": "train_loader override=True progress_bar=False", "functional_variance_fast": "X"},
    "laplace.SubnetLaplace": {"assemble_full_samples": "subnet_samples"},
    "laplace.curvature.CurvatureInterface": {
        "jacobians": "x enable_backprop=False",
        "last_layer_jacobians": "x enable_backprop=False",
        "functorch_jacobians": "x enable_backprop=False",
        "gradients": "x y",
        "full": "x y kwargs",
        "kron": "x y N kwargs",
        "diag": "x y kwargs",
        "eig_lowrank": "data_loader",
    },
    "laplace.curvature.GGNInterface": {"full": "x y kwargs"},
    "laplace.curvature.EFInterface": {"full": "x y kwargs"},
    "laplace.curvature.BackPackInterface": {"jacobians": "x enable_backprop=False", "gradients": "x y"},
    "laplace.curvature.AsdlInterface": {"jacobians": "x enable_backprop=False", "gradients": "x y"},
    "laplace.utils.subnetmask.SubnetMask": {"select": "train_loader=None", "get_subnet_mask": "train_loader"},
}

EVERY = (
    "mean H loss n_data n_params n_layers prior_mean prior_precision prior_precision_diag sigma_noise temperature "
    "backend log_likelihood scatter log_det_prior_precision log_det_posterior_precision log_det_ratio "
    "posterior_precision model likelihood"
)
ATTRIBUTES = {
    ("all", "full"): f"{EVERY} posterior_scale posterior_covariance",
    ("all", "kron"): EVERY,
    ("all", "ekfac"): EVERY,
    ("all", "blockdiag"): f"{EVERY} posterior_scale posterior_covariance",
    ("all", "diag"): f"{EVERY} posterior_scale posterior_variance",
    ("all", "lowrank"): f"{EVERY} V Kinv",
    ("all", "gp"): EVERY.replace(" posterior_precision", "").replace(" H", ""),
    ("last_layer", "full"): f"{EVERY} posterior_scale posterior_covariance",
    ("last_layer", "kron"): EVERY,
    ("last_layer", "ekfac"): EVERY,
    ("last_layer", "diag"): f"{EVERY} posterior_scale posterior_variance",
    ("last_layer", "gp"): EVERY.replace(" posterior_precision", "").replace(" H", ""),
    ("subnetwork", "full"): f"{EVERY} posterior_scale posterior_covariance mean_subnet",
    ("subnetwork", "diag"): f"{EVERY} posterior_scale posterior_variance mean_subnet",
}

MEMBERS = {
    "SubsetOfWeights": "ALL LAST_LAYER SUBNETWORK",
    "HessianStructure": "FULL KRON EKFAC DIAG BLOCKDIAG LOWRANK GP",
    "Likelihood": "REGRESSION CLASSIFICATION REWARD_MODELING",
    "PredType": "GLM NN GP",
    "LinkApprox": "MC PROBIT BRIDGE BRIDGE_NORM",
    "TuningMethod": "MARGLIK GRIDSEARCH",
    "PriorStructure": "SCALAR DIAG LAYERWISE",
}


def resolve(dotted):
    """The object of a dotted name; the longest importable part is the module."""
    parts = dotted.split(".")
    for stop in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:stop]))
        except ModuleNotFoundError:
            continue
        for name in parts[stop:]:
            found = getattr(found, name)
        return found
    raise AssertionError(dotted)


def check(function, documented, skip=0):
    """The first parameters are the documented ones, in that order and with those defaults."""
    expected = [part.partition("=") for part in documented.split()]
    found = list(inspect.signature(function).parameters.values())[skip:]
    assert [p.name for p in found][: len(expected)] == [name for name, _, _ in expected]
    for parameter, (name, _, default) in zip(found, expected, strict=False):
        if default:
            assert parameter.default == ast.literal_eval(default), name


@pytest.mark.parametrize("dotted", CALLABLES)
def test_documented_parameters(dotted):
    check(resolve(dotted), CALLABLES[dotted])


@pytest.mark.parametrize("dotted, method", [(dotted, name) for dotted, names in METHODS.items() for name in names])
def test_documented_methods(dotted, method):
    check(getattr(resolve(dotted), method), METHODS[dotted][method], skip=1)


POSITIONAL = {
    "FullLaplace": (0.7, 2.0, 0.1, 1.5, True, "a", "b", NativeEF, {}),
    "KronLaplace": (0.7, 2.0, 0.1, 1.5, True, "a", "b", NativeEF, True, {}),
    "LowRankLaplace": (0.7, 2.0, 0.1, 1.5, True, "a", "b", NativeEF, {"low_rank": 3}),
    "FunctionalLaplace": (5, 0.7, 2.0, 0.1, 1.5, True, "a", "b", NativeEF, {}, True, 3),
    "DiagLLLaplace": (0.7, 2.0, 0.1, 1.5, True, "average", "a", "b", NativeEF, "2", {}),
    "KronLLLaplace": (0.7, 2.0, 0.1, 1.5, True, "average", "a", "b", NativeEF, "2", True, {}),
    "DiagSubnetLaplace": (torch.tensor([1, 2]), 0.7, 2.0, 0.1, 1.5, NativeEF, {}),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_arguments_by_position_mean_what_they_are_documented_to(name):
    cls = getattr(laplace, name)
    model, _, _ = CASES["regression"].make()
    la = cls(model, "regression", *POSITIONAL[name])
    assert float(la.sigma_noise) == pytest.approx(0.7)
    assert la.prior_precision.tolist() == [2.0]
    assert float(la.prior_mean) == pytest.approx(0.1)
    assert la.temperature == 1.5
    assert isinstance(la.backend, NativeEF)
    if "Subnet" not in name:
        assert (la.enable_backprop, la.dict_key_x, la.dict_key_y) == (True, "a", "b")
    if "LL" in name:
        assert la.model.feature_reduction == "average" and la.model.last_layer_name == "2" and la.model.enable_backprop
    if "Kron" in name:
        assert la.damping
    if name == "FunctionalLaplace":
        assert (la.n_subset, la.independent_outputs, la.seed) == (5, True, 3)
    with pytest.raises(TypeError, match=f"{name} got \\['sigma_noise'\\] by position and by name"):
        cls(model, "regression", *POSITIONAL[name], sigma_noise=1.0)
    with pytest.raises(TypeError, match=f"{name} takes [0-9]+ positional arguments, but got 30"):
        cls(model, "regression", *range(28))


def test_a_posterior_of_a_user_s_own():
    """A subclass with a constructor of its own has its own order, and passes on by position what it likes."""

    class Scaled(laplace.DiagLaplace):
        def __init__(self, model, likelihood, scale, *args, **kwargs):
            super().__init__(model, likelihood, *args, **kwargs)
            self.scale = scale

        @property
        def posterior_precision(self):
            return self.scale * super().posterior_precision

    model, x, y = CASES["regression"].make()
    la, plain = Scaled(model, "regression", 3.0, 0.5), laplace.DiagLaplace(model, "regression", 0.5)
    assert list(inspect.signature(Scaled).parameters) == ["model", "likelihood", "scale", "args", "kwargs"]
    for one in (la, plain):
        one.fit(loader(x, y))
    assert torch.allclose(la.posterior_variance, plain.posterior_variance / 3)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_predictive_is_a_call(likelihood):
    model, x, y = CASES["regression" if likelihood == "regression" else "mlp"].make()
    la = Laplace(model, likelihood, "all", "kron")
    la.fit(loader(x, y))
    for pred_type, link in (("glm", "probit"), ("glm", "mc"), ("nn", "mc")):
        made = [
            function(x, pred_type, link_approx=link, n_samples=7, generator=torch.Generator().manual_seed(0))
            for function in (la.predictive, la)
        ]
        for one, two in zip(*[m if isinstance(m, tuple) else (m,) for m in made], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("case", ["mlp", "sequence-output", "regression"])
def test_functional_samples_are_outputs_and_predictive_ones_their_link(case, pred_type):
    model, x, y = CASES[case].make()
    la = Laplace(model, CASES[case].likelihood, "all", "diag")
    la.fit(loader(x, y))
    made = [
        f(x, pred_type, 50, generator=torch.Generator().manual_seed(0))
        for f in (la.functional_samples, la.predictive_samples)
    ]
    assert made[0].shape == (50, *model(x).shape)
    regression = CASES[case].likelihood == "regression"
    assert torch.allclose(made[0] if regression else made[0].softmax(-1), made[1])
    assert regression or float((made[0].sum(-1) - 1).abs().min()) > 0  # not probabilities


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "gp"])
def test_variances_of_a_last_layer_at_once(structure):
    model, x, y = CASES["mlp"].make(n=8)
    la = Laplace(model, "classification", "last_layer", structure)
    with pytest.raises(laplace.NotFittedError):
        la.functional_variance_fast(x)
    la.fit(loader(x, y))
    f, variance = la.functional_variance_fast(x)
    js, _ = la.backend.last_layer_jacobians(x)
    assert torch.equal(f, model(x))
    assert torch.allclose(variance, la.functional_variance(js).diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("subset, structure", ATTRIBUTES)
def test_documented_attributes_after_fit(subset, structure):
    model, x, y = CASES["mlp"].make(n=8)
    kwargs = {"subnetwork_indices": torch.tensor([0, 3, 17])} if subset == "subnetwork" else {}
    la = Laplace(model, "classification", subset, structure, **kwargs)
    la.fit(loader(x, y))
    for name in ATTRIBUTES[subset, structure].split():
        assert getattr(la, name) is not None, name


@pytest.mark.parametrize(
    "name", ["NativeGGN", "NativeEF", "CurvlinopsGGN", "AsdlGGN", "BackPackGGN", "CurvlinopsHessian"]
)
def test_losses_of_backends(name):
    """``factor`` times ``lossfunc`` is the negative log likelihood with unit noise, up to its constant."""
    cls = getattr(laplace.curvature, name)
    f, y = torch.randn(4, 3), torch.randn(4, 3)
    regression = cls(CASES["regression"].make()[0], "regression")
    assert isinstance(regression.lossfunc, torch.nn.MSELoss) and regression.factor == 0.5
    expected = -torch.distributions.Normal(f, 1.0).log_prob(y).sum() - 12 * 0.5 * math.log(2 * math.pi)
    assert float(regression.factor * regression.lossfunc(f, y)) == pytest.approx(float(expected), rel=1e-5)
    classification = cls(CASES["mlp"].make()[0], "classification")
    assert isinstance(classification.lossfunc, torch.nn.CrossEntropyLoss) and classification.factor == 1.0
    if name.startswith("Asdl"):
        assert (regression.loss_type, classification.loss_type) == ("mse", "cross_entropy")


@pytest.mark.parametrize("name", MEMBERS)
def test_enumerations_are_strings(name):
    kind = getattr(laplace, name)
    assert issubclass(kind, str)
    assert [member.name for member in kind] == MEMBERS[name].split()
    assert all(member.value == member.name.lower() == member for member in kind)
    assert getattr(importlib.import_module("laplace.utils.enums"), name) is kind


@pytest.mark.parametrize("name", [None, "2"])
def test_a_model_may_be_a_feature_extractor(name):
    model, x, y = CASES["mlp"].make()
    made = [
        (laplace.KronLLLaplace(m, "classification"), laplace.DiagLaplace(m, "classification"))
        for m in (model, FeatureExtractor(model, name))
    ]
    for plain, wrapped in zip(*made, strict=True):
        for la in (plain, wrapped):
            la.fit(loader(x, y))
        assert torch.equal(plain(x), wrapped(x))
    assert made[1][0].model.last_layer_name == "2"


def test_every_test_that_the_readme_names_exists():
    root = Path(__file__).resolve().parents[2]
    table = (root / "README.md").read_text().split("| feature |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    files = {path.stem: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    known = set(files) | set(re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.MULTILINE))
    assert len(named) > 30 and named <= known, named - known
    rows = [line.split("|") for line in table.splitlines()[2:]]
    assert all(re.search(r"`test_\w+`", row[3]) for row in rows if len(row) > 1)
