"""Networks of torchvision: a grid of 100 values with a diagonal posterior, and the first and later predictives with Kron."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from harness import Prepare, Row, Target
from problems import forward
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer, mobilenet_v2, resnet18

VALIDATION, BATCH = 64, 32


def _resnet() -> nn.Module:
    return resnet18(num_classes=10).eval()


def _vit() -> nn.Module:
    model = VisionTransformer(32, 4, 6, 3, 192, 768, num_classes=10).eval()
    model.heads.head.reset_parameters()  # zeros at first, through which no gradient reaches the other layers
    return model


def _images(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(count, 3, 32, 32), torch.randint(10, (count,))), batch_size=BATCH)


def _grid(make: Callable[[], nn.Module]) -> Callable[[], object]:
    from laplace import Laplace

    torch.manual_seed(0)
    la = Laplace(make(), "classification", "all", "diag")
    la.fit(_images(BATCH))
    how = {"method": "gridsearch", "grid_size": 100, "val_loader": _images(VALIDATION)}
    return lambda: la.optimize_prior_precision(**how)


def _grid_row(make: Callable[[], nn.Module]) -> Mapping[str, Prepare]:
    return {"ours": partial(_grid, make), "forward pass": lambda: forward(make(), _images(VALIDATION))}


def _predict(first: bool) -> Callable[[], object]:
    from laplace import Laplace

    torch.manual_seed(0)
    la = Laplace(mobilenet_v2(num_classes=10).eval(), "classification", "all", "kron")
    la.fit(_images(8))
    x = torch.rand(1, 3, 32, 32)
    if not first:
        la(x)
    return lambda: la(x)


ROWS = {
    "grid-resnet18": Row(
        f"Grid of 100 values, diag, ResNet-18 ({VALIDATION})",
        partial(_grid_row, _resnet),
        (Target("forward pass", 30),),
    ),
    "grid-vit": Row(
        f"Grid of 100 values, diag, ViT 192 × 6 ({VALIDATION})", partial(_grid_row, _vit), (Target("forward pass", 30),)
    ),
    "mobilenet-first": Row(
        "First predictive of MobileNetV2 with Kron", lambda: {"ours": partial(_predict, True)}, (Target("seconds", 5),)
    ),
    "mobilenet-next": Row("Each later image", lambda: {"ours": partial(_predict, False)}, (Target("seconds", 0.07),)),
}
