"""A sweep over ``torch.nn``: every layer with parameters or state is right against dense float64 Jacobians, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace import Laplace

from .planned import planned
from .random_models import Case
from .torch_layers import LAYERS, LAZY, VOCABULARY, Around, Layer, classes, is_known
from .verdicts import examine

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


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True)])
def test_a_norm_before_a_transposed_sequence_in_batches_of_one(norm):
    """Torch's own gradient of one example is wrong there; that of two is right."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 1), norm(3), nn.Flatten(2), Transposed(), nn.LayerNorm(3), nn.Flatten(), nn.Linear(24, 2))
    model = nn.Sequential(*layers).double().eval()
    x, y = torch.randn(4, 2, 2, 4).double(), torch.tensor([0, 1, 1, 0])
    for structure in ("diag", "full"):
        one, all_at_once = (Laplace(model, "classification", "all", structure) for _ in range(2))
        one.fit([(x[i : i + 1], y[i : i + 1]) for i in range(4)])
        all_at_once.fit([(x, y)])
        torch.testing.assert_close(one.H, all_at_once.H)
        torch.testing.assert_close(one(x[:1]), all_at_once(x)[:1])


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class NormOfImages(nn.Module):
    """An instance norm of images as a function or by hand, then positions first or examples first."""

    def __init__(self, by_hand, positions_first):
        super().__init__()
        self.by_hand, self.positions_first = by_hand, positions_first
        self.conv, self.head = nn.Conv2d(2, 3, 1), nn.Linear(24, 2)
        self.w, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = self.conv(x)
        if self.by_hand:
            variance, mean = torch.var_mean(h, (2, 3), correction=0, keepdim=True)
            h = (h - mean) / (variance + 1e-5).sqrt() * self.w.view(-1, 1, 1) + self.b.view(-1, 1, 1)
        else:
            h = F.instance_norm(h, weight=self.w, bias=self.b)
        if self.positions_first:
            h = (h.permute(2, 3, 0, 1).contiguous() * torch.arange(3.0)).permute(2, 0, 1, 3)
        else:
            h = h.flatten(2).transpose(1, 2).contiguous() * torch.arange(3.0)
        return self.head(h.flatten(1))


@pytest.mark.parametrize("positions_first", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_a_functional_instance_norm_whose_gradient_is_transposed(structure, batch_size, positions_first):
    """Torch's own gradient is wrong there too: of one example, and of several with positions first."""
    torch.manual_seed(0)
    ours = NormOfImages(False, positions_first).double().eval()
    truth = NormOfImages(True, positions_first).double().eval()
    truth.load_state_dict(ours.state_dict())
    x, y = torch.randn(4, 2, 2, 4).double(), torch.tensor([0, 1, 1, 0])
    found = []
    for model in (ours, truth):
        la = Laplace(model, "classification", "all", structure)
        la.fit([(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, 4, batch_size)])
        found.append(la)
    curvature = [la.H.to_matrix() if structure == "kron" else la.H for la in found]
    torch.testing.assert_close(*curvature)
    torch.testing.assert_close(found[0](x[:1]), found[1](x[:1]))


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
