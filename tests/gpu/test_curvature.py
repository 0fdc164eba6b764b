"""Curvature, evidence and predictives on a GPU are those on the CPU, for every kind of layer, structure, estimator and backend."""

from __future__ import annotations

import pytest
import torch
from core.models import CASES
from core.naive import relative_error

from laplace import Laplace, marglik_training
from laplace.curvature import NativeGGN, backend_class

STRUCTURES = ("full", "kron", "diag", "ekfac", "blockdiag", "lowrank", "gp")


def fitted(name, structure, backend, estimator, device):
    case = CASES[name]
    model, x, y = case.make()
    model, x, y = model.to(device), x.to(device), y.to(device)
    cls, kwargs = backend_class(backend, estimator)
    kwargs = {**kwargs, "seed": 3} if estimator == "mc" else kwargs
    if structure == "lowrank":
        cls, kwargs = NativeGGN, {"low_rank": 60}
    la = Laplace(
        model, case.likelihood, "all", structure, backend=cls, backend_kwargs=kwargs, prior_precision=torch.tensor(0.7)
    )
    la.fit([(x[:3], y[:3]), (x[3:], y[3:])])
    return la, x


def numbers(la, x):
    """What does not depend on a generator; every tensor has to be on the model's device."""
    prediction = la._glm_predictive_distribution(x)
    found = {
        "evidence": la.log_marginal_likelihood(),
        "mean": prediction[0],
        "variance": prediction[1],
        "loss": la.loss,
    }
    found |= {} if la.sums is None else dict(la.sums.tensors)
    devices = {value.device.type for value in found.values()}
    assert devices == {x.device.type}, devices
    return {key: value.detach().cpu() for key, value in found.items()}


def compare(name, structure, backend="native", estimator="ggn", tolerance=1e-8):
    expected, found = (numbers(*fitted(name, structure, backend, estimator, device)) for device in ("cpu", "cuda"))
    vectors = {key for key in expected if structure == "lowrank" and key in ("vectors", "values")}
    for key in expected.keys() - vectors:
        assert relative_error(found[key], expected[key]) < tolerance, key


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_and_structure(name, structure):
    compare(name, structure)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("name", ["mlp", "stride-padding", "embedding", "normed", "sequence-output"])
@pytest.mark.parametrize("estimator", ["mc", "ef"])
def test_estimators_draw_the_same_labels_on_every_device(name, structure, estimator):
    compare(name, structure, estimator=estimator)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("backend", ["curvlinops", "asdl", "backpack"])
def test_backends(backend, structure):
    compare("mlp", structure, backend)


@pytest.mark.parametrize(
    "subset, structure",
    [("last_layer", s) for s in ("full", "kron", "diag", "gp")] + [("subnetwork", "full"), ("subnetwork", "diag")],
)
def test_subsets_tuning_and_states(subset, structure, device, tmp_path):
    def everything(where):
        model, x, y = CASES["mlp"].make(n=12)
        model, x, y = model.to(where), x.to(where), y.to(where)
        extra = {"subnetwork_indices": torch.tensor([0, 2, 17])} if subset == "subnetwork" else {}
        la = Laplace(model, "classification", subset, structure, **extra)
        loader = [(x[:7], y[:7]), (x[7:], y[7:])]
        la.fit(loader)
        if structure != "gp":
            la.optimize_prior_precision(n_steps=10)
        tuned = la.prior_precision.detach().cpu()
        la.optimize_prior_precision(method="gridsearch", val_loader=loader, grid_size=5)
        found = [tuned, la.prior_precision, la(x), la.log_marginal_likelihood()]
        if structure != "gp":
            assert la.sample(3).device == la.predictive_samples(x, n_samples=3).device == x.device
            torch.save(la.state_dict(), tmp_path / f"{where}.pt")
            la.load_state_dict(torch.load(tmp_path / f"{where}.pt", weights_only=True))
            found.append(la(x))
        return [value.detach().cpu() for value in found]

    for one, other in zip(everything(device.type), everything("cpu"), strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_state_of_the_cpu_is_loaded_on_a_gpu_and_back(structure, device, tmp_path):
    model, x, y = CASES["mlp"].make()
    la = Laplace(model, "classification", "all", structure)
    la.fit([(x, y)])
    expected = la(x)
    torch.save(la.state_dict(), tmp_path / "state.pt")
    there = Laplace(CASES["mlp"].make()[0].to(device), "classification", "all", structure)
    there.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert relative_error(there(x.to(device)).cpu(), expected) < 1e-8
    torch.save(there.state_dict(), tmp_path / "there.pt")
    back = Laplace(model, "classification", "all", structure)
    back.load_state_dict(torch.load(tmp_path / "there.pt", weights_only=True, map_location="cpu"))
    assert relative_error(back(x), expected) < 1e-8


def test_training_with_the_evidence(device):
    def train(where):
        model, x, y = CASES["mlp"].make(n=20)
        torch.manual_seed(0)
        la, *_, losses = marglik_training(
            model.to(where),
            [(x.to(where), y.to(where))],
            "classification",
            n_epochs=6,
            n_hypersteps=3,
            marglik_frequency=2,
        )
        return la.prior_precision.cpu(), torch.tensor(losses)

    for one, other in zip(train(device), train("cpu"), strict=True):
        assert relative_error(one, other) < 1e-6
