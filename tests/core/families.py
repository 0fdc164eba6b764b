"""The families of torchvision and timm in small, and what the library has to get right about each of them.

The reference knows a model as a function: one call of ``torch.autograd.grad`` for each output of each example.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import (
    convnext,
    densenet,
    efficientnet,
    maxvit,
    mobilenetv3,
    regnet,
    resnet,
    shufflenetv2,
    vgg,
    video,
)
from torchvision.models import swin_transformer as swin
from torchvision.models.video import mvit
from torchvision.models.video import swin_transformer as swin_3d

from laplace import Laplace

OUTPUTS = 3
TOLERANCE = 1e-8  # relative, of double precision: batches of two may take other kernels than one example alone


def _small_classifier(model: nn.Module, width: int) -> nn.Module:
    model.classifier = nn.Sequential(nn.Linear(width, 4), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, OUTPUTS))
    return model


def _mobile_v3() -> nn.Module:
    config = partial(mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    blocks = [config(8, 3, 8, 8, True, "RE", 2, 1), config(8, 5, 16, 8, True, "HS", 1, 1)]
    return mobilenetv3.MobileNetV3(blocks, 8, num_classes=OUTPUTS)


def _efficient() -> nn.Module:
    config = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    fused = efficientnet.FusedMBConvConfig(2, 3, 2, 8, 8, 1)
    return efficientnet.EfficientNet([fused, config(2, 3, 1, 8, 8, 1)], 0.2, 0.2, num_classes=OUTPUTS, last_channel=8)


def _mvit() -> nn.Module:
    block = partial(mvit.MSBlockConfig, num_heads=1, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3], stride_kv=[1, 2, 2])
    blocks = [block(input_channels=4, output_channels=8, stride_q=[1, 1, 1]), block(input_channels=8, output_channels=8, stride_q=[1, 2, 2])]  # fmt: skip
    return mvit.MViT((16, 16), 4, blocks, True, True, True, 0.5, 0.0, 0.1, num_classes=OUTPUTS)


def _s3d() -> nn.Module:
    model = video.S3D(OUTPUTS)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # in place of one for images of 224 x 224
    return model


IMAGE, CLIP = (3, 32, 32), (3, 4, 16, 16)

# Family by the module that holds it: a function that makes one of it, and the shape of an input.
TORCHVISION: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "alexnet": (lambda: _small_classifier(models.AlexNet(OUTPUTS), 9216), (3, 64, 64)),
    "convnext": (
        lambda: models.ConvNeXt(
            [convnext.CNBlockConfig(4, 8, 1), convnext.CNBlockConfig(8, None, 1)], 0.1, num_classes=OUTPUTS
        ),
        IMAGE,
    ),
    "densenet": (lambda: densenet.DenseNet(2, (1, 2), 4, num_classes=OUTPUTS, memory_efficient=True), IMAGE),
    "efficientnet": (_efficient, IMAGE),
    "googlenet": (lambda: models.GoogLeNet(OUTPUTS, aux_logits=False, init_weights=False), IMAGE),
    "inception": (lambda: models.Inception3(OUTPUTS, aux_logits=False, init_weights=False), (3, 75, 75)),
    "maxvit": (
        lambda: maxvit.MaxVit((16, 16), 4, 2, [4, 4], [1, 1], 2, 0.1, num_classes=OUTPUTS),
        (3, 16, 16),
    ),
    "mnasnet": (lambda: models.MNASNet(0.1, OUTPUTS), IMAGE),
    "mobilenetv2": (
        lambda: models.MobileNetV2(OUTPUTS, 0.1, [[1, 8, 1, 1], [2, 8, 2, 2]]),
        IMAGE,
    ),
    "mobilenetv3": (_mobile_v3, IMAGE),
    "regnet": (
        lambda: models.RegNet(
            regnet.BlockParams.from_init_params(4, 8, 8.0, 2.0, 4, se_ratio=0.25), OUTPUTS, stem_width=4
        ),
        IMAGE,
    ),
    "resnet": (lambda: models.ResNet(resnet.Bottleneck, [1, 1, 1, 1], OUTPUTS, groups=4, width_per_group=2), IMAGE),
    "shufflenetv2": (lambda: shufflenetv2.ShuffleNetV2([1, 1, 1], [8, 8, 16, 32, 16], OUTPUTS), IMAGE),
    "squeezenet": (lambda: models.SqueezeNet("1_1", OUTPUTS), IMAGE),
    "swin_transformer": (
        lambda: swin.SwinTransformer([2, 2], 4, [1, 2], [1, 2], [2, 2], stochastic_depth_prob=0.1, num_classes=OUTPUTS),
        (3, 8, 8),
    ),
    "vgg": (
        lambda: _small_classifier(vgg.VGG(vgg.make_layers([2, "M", 3, "M"], batch_norm=True), OUTPUTS), 147),
        (3, 28, 28),
    ),
    "video.mvit": (_mvit, CLIP),
    "video.resnet": (
        lambda: video.VideoResNet(
            video.resnet.BasicBlock, [video.resnet.Conv2Plus1D] * 4, [1] * 4, video.resnet.R2Plus1dStem, OUTPUTS
        ),
        CLIP,
    ),
    "video.s3d": (_s3d, (3, 8, 32, 32)),
    "video.swin_transformer": (
        lambda: swin_3d.SwinTransformer3d([2, 2, 2], 4, [1, 1], [1, 2], [2, 2, 2], stochastic_depth_prob=0.1, num_classes=OUTPUTS),
        (3, 2, 8, 8),
    ),
    "vision_transformer": (lambda: models.VisionTransformer(16, 8, 2, 2, 4, 6, num_classes=OUTPUTS), (3, 16, 16)),
}  # fmt: skip

LARGE = ("googlenet", "inception", "video.resnet", "video.s3d")  # millions of weights: in the benchmark alone
NO_VECTOR = ("detection.", "segmentation.", "optical_flow.", "quantization.")  # families without one vector of outputs


def torchvision_families() -> set[str]:
    """The families that this torchvision has and that give one vector of outputs."""
    names = (models.get_model_builder(name).__module__ for name in models.list_models())
    found = {name.removeprefix("torchvision.models.") for name in names}
    return {name for name in found if not name.startswith(NO_VECTOR)}


def small(family: str) -> tuple[nn.Module, torch.Tensor]:
    """A small model of a family of torchvision, and inputs for it."""
    make, shape = TORCHVISION[family]
    return prepared(make()), torch.randn(2, *shape)


@torch.no_grad()
def prepared(model: nn.Module) -> nn.Module:
    """In evaluation mode, with scales and statistics as of training: families start residual branches at zero."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.ndim <= 1 or not bool(p.any()):
                p.add_(0.1 * torch.randn_like(p))
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def compare(model: nn.Module, x: torch.Tensor) -> float:
    """Fit a diagonal posterior of a regression, and return its largest error by layer, relative.

    Both diagonal curvature and predictive variance are compared with gradients of each output of each example.
    """
    model, x = model.double(), x.double()
    la = Laplace(model, "regression", "all", "diag", prior_precision=2.0)
    la.fit([(x, torch.zeros(len(x), OUTPUTS, dtype=torch.float64))])
    mean, variance = la(x, diagonal_output=True)
    model.train().eval()  # drops what some modules keep between passes
    diagonal, spread, f = _reference(model, x, la)
    errors = [(a - b).norm() / b.norm().clamp(min=1e-8 * diagonal.norm()) for a, b in _by_parameter(la, diagonal)]
    errors.append((mean - f).norm() / f.norm())
    errors.append((variance - spread).norm() / spread.norm())
    return float(torch.stack(errors).max())


def _reference(model: nn.Module, x: torch.Tensor, la: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    params = [p for p in model.parameters() if p.requires_grad]
    squares, outputs = [], []
    for i in range(len(x)):
        outputs.append(
            model(x[[i, i]])[0]
        )  # of one alone, torch's batch norm has wrong gradients in some memory orders
        for value in outputs[-1]:
            grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
            squares.append(torch.cat([g.flatten() for g in flat]).square())
    diagonal = torch.stack(squares).sum(0)
    precision = diagonal + 2.0
    spread = torch.stack([(row / precision).sum() for row in squares]).view(len(x), -1)
    return diagonal, spread, torch.stack(outputs).detach()


def _by_parameter(la: Any, diagonal: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sizes = [p.numel() for p in la.params]
    return list(zip(la.H.split(sizes), diagonal.split(sizes), strict=True))
