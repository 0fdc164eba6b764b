"""One small model of every family of torchvision, and some of timm's: curvature and variances of gradients one by one.

All families of timm, and the larger ones of torchvision, are in ``benchmarks/families.py``.
"""

from __future__ import annotations

import pytest
import timm
import torch

from laplace import Laplace

from .families import LARGE, OUTPUTS, TOLERANCE, TORCHVISION, compare, prepared, small, torchvision_families

TIMM = ("test_convnext2", "test_efficientnet", "test_resnet", "test_vit")
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array", "ignore:No Kronecker factors")


def test_every_family_of_torchvision_has_a_small_model():
    assert torchvision_families() <= set(TORCHVISION)


@pytest.mark.parametrize("family", sorted(set(TORCHVISION) - set(LARGE)))
def test_a_family_of_torchvision(family):
    torch.manual_seed(0)
    assert compare(*small(family)) < TOLERANCE


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    torch.manual_seed(0)
    model = prepared(timm.create_model(name, num_classes=OUTPUTS))
    size = 160 if "vit" in name else 32
    assert compare(model, torch.randn(2, 3, size, size)) < TOLERANCE


@pytest.mark.parametrize("family", ["resnet", "vision_transformer", "convnext"])
def test_factors_and_last_layers_of_a_family(family):
    """They fit and predict; that they are the right numbers is shown layer by layer elsewhere."""
    torch.manual_seed(0)
    model, x = small(family)
    for subset in ("all", "last_layer"):
        la = Laplace(model, "classification", subset, "kron")
        la.fit([(x, torch.tensor([0, 2]))])
        assert bool(la(x).isfinite().all()) and bool(la.log_marginal_likelihood().isfinite())


def test_a_model_of_segmentation_says_what_to_take_of_its_output():
    from torchvision.models import segmentation

    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2).eval()
    with pytest.raises(TypeError, match="OrderedDict.*Wrap the model"):
        Laplace(model, "classification", "all", "diag").fit(
            [(torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32).long())]
        )


def test_a_model_of_detection_says_what_it_is_given():
    from torchvision.models import detection

    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2).eval()
    with pytest.raises((TypeError, ValueError), match="Wrap the model|inputs are a list"):
        Laplace(model, "classification", "all", "diag").fit([([torch.randn(3, 32, 32)], torch.zeros(1).long())])
