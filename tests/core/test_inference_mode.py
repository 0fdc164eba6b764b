"""Everything inside of ``torch.inference_mode()``, as in a prediction loop of Lightning, gives what it gives outside."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, marglik_training

STRUCTURES = ["full", "kron", "diag", "ekfac", "lowrank", "gp"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def loader():
    make = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=make), torch.randint(3, (12,), generator=make)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def everything(model, data, structure):
    options = {"n_subset": 8} if structure == "gp" else {}
    la = Laplace(model, "classification", "all", structure, prior_precision=torch.tensor(2.0), **options)
    la.fit(data)
    la.prior_precision = torch.tensor(3.0)
    pred_type = "gp" if structure == "gp" else "glm"
    la.optimize_prior_precision(
        method="gridsearch", pred_type=pred_type, val_loader=data, grid_size=3, log_prior_prec_max=2
    )
    if structure != "gp":
        la.optimize_prior_precision(method="marglik", n_steps=3)
    return la, la(next(iter(data))[0], pred_type=pred_type)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_posterior_of_its_own_from_fit_to_predictive(structure):
    _, expected = everything(network(), loader(), structure)
    model = network()
    with torch.inference_mode():
        la, found = everything(model, loader(), structure)
    assert torch.equal(found, expected)
    x = next(iter(loader()))[0]
    again = la(x, pred_type="gp" if structure == "gp" else "glm")
    assert torch.equal(again, expected), "and outside, later"
    if structure != "gp":
        la.optimize_prior_precision(method="marglik", n_steps=3)


def test_training_on_the_evidence():
    expected = marglik_training(network(), loader(), n_epochs=2, n_hypersteps=1)[2]
    model = network()
    with torch.inference_mode():
        assert marglik_training(model, loader(), n_epochs=2, n_hypersteps=1)[2] == expected


def test_a_model_that_was_built_there_is_refused_and_a_copy_is_not():
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match=r"0\.weight.*made inside torch\.inference_mode.*copy\.deepcopy"):
        Laplace(model, "classification", "all", "diag")
    Laplace(copy.deepcopy(model), "classification", "all", "diag").fit(loader())
