"""Every tensor takes its device from the model or the data: with another default device, nothing lands there.

The default device is one whose tensors hold no numbers. A tensor that was made without saying where cannot then meet one
of the model's: torch refuses to mix the two, and a result that came from such a tensor alone has no values. So this shows
on any machine what a model on an accelerator asks of the library.
"""

from __future__ import annotations

import pytest
import torch

from laplace import Laplace, marglik_training
from laplace.curvature import NativeEF, NativeGGN
from laplace.linalg.precision import double
from laplace.utils import RunningNLLMetric, subnetmask, validate

from .models import CASES, mlp


@pytest.fixture
def elsewhere():
    """Make new tensors land on a device without numbers, unless told otherwise."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def data(likelihood, n=12):
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64, device="cpu")
    classes = torch.randint(3, (n,), generator=generator, device="cpu")
    y = classes if likelihood == "classification" else x.roll(1, 1).tanh()
    return x, [(x[:7], y[:7]), (x[7:], y[7:])]


def network():
    with torch.device("cpu"):
        torch.manual_seed(0)
        return mlp().double()


def values(result):
    """Flatten what a predictive or an evidence returns."""
    parts = result if isinstance(result, tuple) else (result,)
    for part in parts:
        assert part.device.type == "cpu"
    return torch.cat([part.detach().flatten() for part in parts])


ALL = [("all", s) for s in ("full", "kron", "diag", "lowrank", "gp")]
LAST = [("last_layer", s) for s in ("full", "kron", "diag", "gp")]
SUBNET = [("subnetwork", s) for s in ("full", "diag")]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("subset, structure", ALL + LAST + SUBNET)
def test_fit_evidence_tuning_and_predictives_stay_with_the_model(subset, structure, likelihood):
    """The numbers, too, are those without the other default device."""

    def everything():
        x, loader = data(likelihood)
        extra = {"subnetwork_indices": torch.tensor([0, 2, 17], device="cpu")} if subset == "subnetwork" else {}
        extra |= {"n_subset": 8} if structure == "gp" else {}
        la = Laplace(network(), likelihood, subset, structure, prior_precision=2.0, **extra)
        la.fit(loader)
        seeded = lambda: torch.Generator("cpu").manual_seed(1)  # noqa: E731
        found = [la.log_marginal_likelihood(), la(x)]
        if structure != "gp":
            found += [la.sample(3, generator=seeded())]
            found += [la(x, pred_type="nn", link_approx="mc", n_samples=3, generator=seeded())]
            found += [la.predictive_samples(x, n_samples=3, generator=seeded())]
            found += [la.log_prob(la.sample(1, generator=seeded())), la.scatter, la.log_det_ratio]
            la.load_state_dict(la.state_dict())
        links = ["probit", "mc", "bridge", "bridge_norm"] if likelihood == "classification" else []
        found += [la(x, link_approx=link, n_samples=4, generator=seeded()) for link in links]
        la.optimize_prior_precision(method="gridsearch", val_loader=loader, grid_size=3, log_prior_prec_min=-1)
        found.append(la.prior_precision)
        if structure != "gp":
            la.optimize_prior_precision(n_steps=3)
            found.append(la.prior_precision)
        return torch.cat([values(result) for result in found])

    expected = everything()
    torch.set_default_device("meta")
    try:
        found = everything()
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("structure", ["full", "kron", "diag", "ekfac", "blockdiag"])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_curvature_of_every_kind_of_layer_stays_with_the_model(name, structure, estimator, elsewhere):
    case = CASES[name]
    with torch.device("cpu"):
        model, x, y = case.make()
    backend, kwargs = (NativeEF if estimator == "empirical" else NativeGGN), {}
    if estimator == "sampled":
        kwargs = {"stochastic": True}
    la = Laplace(model, case.likelihood, "all", structure, backend=backend, backend_kwargs=kwargs)
    la.fit([(x, y)])
    assert la.log_marginal_likelihood().isfinite()
    assert all(tensor.device.type == "cpu" for tensor in la.sums.tensors.values())


def test_training_with_the_evidence_stays_with_the_model(elsewhere):
    _, loader = data("regression")
    la, model, _, losses = marglik_training(network(), loader, "regression", n_epochs=3, n_hypersteps=2)
    assert values((la.prior_precision, la.sigma_noise)).isfinite().all() and len(losses) == 3


def test_validation_stays_with_the_model(elsewhere):
    x, loader = data("classification")
    la = Laplace(network(), "classification", "all", "diag")
    la.fit(loader)
    with torch.device("cpu"):
        metric = RunningNLLMetric()
    assert validate(la, loader, metric) > 0


def test_subnetwork_masks_stay_with_the_model(elsewhere):
    _, loader = data("classification")
    model = network()
    masks = [
        subnetmask.LargestMagnitudeSubnetMask(model, 5),
        subnetmask.RandomSubnetMask(model, 5),
        subnetmask.ParamNameSubnetMask(model, ["0.weight"]),
        subnetmask.ModuleNameSubnetMask(model, ["2"]),
        subnetmask.LastLayerSubnetMask(model),
        subnetmask.LargestVarianceSWAGSubnetMask(model, 5, "classification", swag_n_snapshots=2),
        subnetmask.LargestVarianceDiagLaplaceSubnetMask(model, 5, Laplace(model, "classification", "all", "diag")),
    ]
    for mask in masks:
        assert mask.select(loader).device.type == "cpu"


def test_a_device_without_float64_is_refused_and_losses_go_to_the_host(monkeypatch):
    """Apple's MPS; there is none here, so one is made up."""

    class Elsewhere:
        device = torch.device("mps")

        def cpu(self):
            return torch.ones(2)

        def double(self):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )

    assert double(Elsewhere()).dtype is torch.float64
    assert double(torch.ones(2)).dtype is torch.float64
    model, x, y = CASES["mlp"].make()
    for structure in ("full", "kron", "diag", "lowrank", "gp"):
        la = Laplace(model, "classification", "all", structure)
        monkeypatch.setattr(type(la), "_device", torch.device("mps"))
        with pytest.raises(ValueError, match="'mps', which has no float64, .* model.cpu\\(\\)"):
            la.initialize(x)


@pytest.mark.parametrize(
    "subset, structure", [("all", "kron"), ("all", "diag"), ("last_layer", "kron"), ("last_layer", "full")]
)
@pytest.mark.parametrize("form", [list, torch.as_tensor])
def test_weights_of_examples_stay_with_the_model(elsewhere, form, subset, structure):
    """Given as numbers or as a tensor, wherever new tensors land."""
    x, ((inputs, targets), _) = data("classification")
    with torch.device("cpu"):
        weights = form([2.0, 0.0, 1.0, 1.0, 0.5, 3.0, 0.25])
    la = Laplace(network(), "classification", subset, structure)
    la.initialize(x)
    sums = la.zero_sums()
    la.accumulate(sums, inputs, targets, example_weights=weights)
    la.set_sums(sums)
    assert all(value.device.type == "cpu" for value in sums.to_tensors().values())
    assert sums.n_data == 7.75 and bool(values(la(x)).isfinite().all())
