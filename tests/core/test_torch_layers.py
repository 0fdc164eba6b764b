"""A sweep over ``torch.nn``: every layer with parameters or state is right against dense float64 Jacobians, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace import Laplace

from .dense_reference import examine
from .planned import planned
from .random_models import Case
from .torch_layers import LAYERS, LAZY, VOCABULARY, Around, Layer, classes, is_known

CASES = {
    f"{name} {variant}".strip(): case
    for name, variants in LAYERS.items()
    for variant, case in variants.items()
    if name in classes()
}


def case_of(layer: Layer) -> Case:
    """The layer in its model, and data for it."""
    model = Around(layer)
    n = 5
    x = torch.randint(VOCABULARY, (n, *layer.shape)) if layer.tokens else torch.randn(n, *layer.shape).double()
    return Case(model.double(), x, torch.randint(2, (n,)), "last")


@pytest.mark.parametrize("name", sorted(classes()))
def test_every_class_is_swept_or_has_nothing_to_sweep(name):
    assert is_known(name, classes()[name]), f"torch.nn.{name} is new: give it a case in tests/core/torch_layers.py."


@pytest.mark.filterwarnings("ignore:No Kronecker factors")
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_a_layer_is_right(name, structure):
    verdict = examine(planned(lambda: case_of(CASES[name]), structure))
    assert verdict.kind == "right", verdict


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_a_layer_without_a_right_number_is_refused_by_name(name):
    case = case_of(CASES[name])
    with pytest.raises(ValueError, match=CASES[name].refused):
        Laplace(case.model, "classification", "all", "diag").fit(case.batches(4))


@pytest.mark.parametrize("name", LAZY)
def test_a_lazy_layer_is_refused_until_its_first_pass_and_then_an_ordinary_one(name):
    make, shape = LAZY[name]
    model = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=f"0.*{name}.*forward pass"):
        Laplace(model, "classification", "all", "diag")
    x, y = torch.randn(4, *shape), torch.tensor([0, 1, 1, 0])
    model(x)
    la = Laplace(model.eval(), "classification", "all", "diag")
    la.fit([(x, y)])
    assert bool(la(x).isfinite().all())
