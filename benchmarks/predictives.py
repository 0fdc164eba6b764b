"""One predictive of deep networks, and a grid of 100 prior precisions, in forward passes over the same images.

    python benchmarks/predictives.py

One thread, CPU seconds, the least of some; 32 images of 3 × 32 × 32 (one for MobileNetV2, 64 for the grid), random weights.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from laplace import Laplace
from laplace.tuning import prior_precision_grid, score_grid

sys.path.insert(0, str(Path(__file__).parent / "rows"))
from large import _images, _resnet, _vit  # noqa: E402


def seconds(work: Callable[[], object], runs: int) -> float:
    """CPU seconds of the fastest of some runs."""
    found = []
    for _ in range(runs):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> None:
    """One forward pass."""
    model(x)


def row(name: str, model: nn.Module, structure: str, images: int) -> None:
    """Print what one predictive takes."""
    la = Laplace(model, "classification", "all", structure)
    la.fit(_images(32 if images > 1 else 8))
    x = torch.rand(images, 3, 32, 32)
    la(x)  # decomposes
    passes = seconds(lambda: la(x), 2) / seconds(lambda: forward(model, x), 5)
    print(f"| {name}, {structure}, images: {images} | {passes:.0f} |", flush=True)


def main() -> None:
    """Print one row for each network."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print("| work | forward passes |", "| --- | --- |", sep="\n")
    row("ResNet-18", _resnet(), "diag", 32)
    row("ResNet-18", _resnet(), "kron", 32)
    row("ViT 192 × 6", _vit(), "diag", 32)
    row("MobileNetV2", mobilenet_v2(num_classes=10).eval(), "kron", 1)
    model, batches = _resnet(), list(_images(64))
    la = Laplace(model, "classification", "all", "diag")
    la.fit(_images(32))
    grid = seconds(lambda: score_grid(la, batches, prior_precision_grid()), 1)
    passes = grid / seconds(lambda: [forward(model, x) for x, _ in batches], 5)
    print(f"| ResNet-18, diag, a grid of 100 values, 64 images | {passes:.0f} |")


if __name__ == "__main__":
    main()
