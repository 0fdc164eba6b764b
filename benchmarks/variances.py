"""What decides how variances of several positions are made: matrices or pairs of positions, and how many gradients are held.

    python benchmarks/variances.py

Seconds of one predictive on two threads: by pairs alone, by matrices alone and as chosen, by numbers of classes; and with a
quarter to twice of the elements that are held at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from patches import least
from torch import nn
from torchvision.models import resnet18

from laplace import Laplace
from laplace.backends import captured_model
from laplace.capture import outer_variance
from laplace.curvature import backend_class

sys.path.insert(0, str(Path(__file__).resolve().parent / "rows"))
from large import _images, _vit  # noqa: E402

CLASSES, IMAGES = (10, 30, 100), 8
HELD = tuple(1 << bits for bits in (25, 26, 27, 28))


def fitted(model: nn.Module, structure: str) -> Laplace:
    """A posterior of a sampled Fisher over random images."""
    cls, kwargs = backend_class("native", "mc")
    la = Laplace(model, "classification", "all", structure, backend=cls, backend_kwargs=kwargs)
    la.fit(_images(IMAGES))
    return la


def seconds(la: Laplace, n: int) -> float:
    """Of one predictive."""
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return least(lambda: la(x), 3) / 1e3


def ways() -> None:
    """Print the seconds of pairs, of matrices and of what is chosen."""
    print("| network, classes | pairs | matrices | chosen |", "| --- | --- | --- | --- |", sep="\n")
    chosen = outer_variance._multiplies_positions
    for classes in CLASSES:
        torch.manual_seed(0)
        la = fitted(resnet18(num_classes=classes).eval(), "kron")
        cells = []
        for way in (lambda *sizes: False, lambda *sizes: sizes[2] > 1, chosen):
            outer_variance._multiplies_positions = way
            cells.append(f"{seconds(la, IMAGES):.2f} |")
        print(f"| ResNet-18, {classes} |", *cells, flush=True)
    outer_variance._multiplies_positions = chosen


def held() -> None:
    """Print the seconds by the elements of gradients that are held at once."""
    print("| network |", *(f"2^{size.bit_length() - 1} |" for size in HELD))
    print("| --- |", *("--- |" for _ in HELD))
    default = captured_model._HELD
    makes: dict[str, Callable[[], nn.Module]] = {
        "ResNet-18, 100 classes, 32 images": lambda: resnet18(num_classes=100).eval(),
        "ViT 192 × 6, 64 images": _vit,
    }
    for name, make in makes.items():
        torch.manual_seed(0)
        la, cells = fitted(make(), "diag"), []
        for size in HELD:
            captured_model._HELD = size
            cells.append(f"{seconds(la, 32 if 'ResNet' in name else 64):.2f} |")
        print(f"| {name} |", *cells, flush=True)
    captured_model._HELD = default


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    ways()
    print()
    held()
