"""Rows of a CUDA device: Kron MC of ResNet-50 and of GPT-2 in gradient steps, and how busy the loader keeps the device.

Published beside the first: curvlinops, 2.6 gradient steps eager and 1.8 compiled on an A6000; kronfluence, 454 s for 100,000
images on an A100.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from harness import Prepare, Row, Target, seconds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

DEVICE = "cuda"
IMAGES, BATCHES, READERS = 64, 8, 8
TOKENS, SEQUENCES = 256, 8


def resnet50() -> nn.Module:
    """ResNet-50 with random weights."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50().eval()


def gpt2() -> nn.Module:
    """GPT-2 small with random weights; its table of words, which is its head too, is left out of the curvature."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.transformer.wte.requires_grad_(False)
    return model


def images(n: int = IMAGES, size: int = 224) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, size, size, generator=generator), torch.randint(1000, (n,), generator=generator)


def tokens(n: int = SEQUENCES, length: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Random sequences, and the next word of each position."""
    words = torch.randint(50257, (n, length + 1), generator=torch.Generator().manual_seed(0))
    return words[:, :-1], words[:, 1:]


def _synchronised(call: Callable[[], object], device: str) -> None:
    call()
    if device == "cuda":
        torch.cuda.synchronize()


def _step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    out = model(x)
    out = out if isinstance(out, Tensor) else out.logits
    F.cross_entropy(out.flatten(0, -2), y.flatten()).backward()


def _sums(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Iterable[tuple[Tensor, Tensor]]], None]:
    """Return what adds the sums of batches, with the model's checks done."""
    from laplace import Laplace
    from laplace.curvature import backend_class

    cls, kwargs = backend_class("native", "mc")
    la = Laplace(model, "classification", "all", "kron", backend=cls, backend_kwargs=kwargs)
    la.initialize(x)
    sums = la.zero_sums()

    def add(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for inputs, targets in batches:
            la.accumulate(sums, inputs.to(x.device, non_blocking=True), targets.to(x.device, non_blocking=True))

    return add


def _kron(
    make: Callable[[], nn.Module], data: tuple[Tensor, Tensor], device: str = DEVICE
) -> Mapping[str, Prepare | float]:
    model, (x, y) = make().to(device), (t.to(device) for t in data)
    add = _sums(model, x, y)
    ours = seconds(lambda: lambda: _synchronised(lambda: add([(x, y)]), device), 5)
    step = seconds(lambda: lambda: _synchronised(lambda: _step(model, x, y), device), 5)
    return {"ours": ours, "gradient step": step, "s for 100,000 examples": 1e5 * ours / len(x)}


class Photographs(Dataset):
    """Images that take a reader some milliseconds each, as decoding does."""

    def __init__(self, n: int, size: int = 224):
        """Of so many images."""
        self.n, self.size = n, size

    def __len__(self) -> int:
        """Number of images."""
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One of them."""
        raw = torch.randint(256, (3, self.size + 32, self.size + 32), generator=torch.Generator().manual_seed(index))
        image = F.interpolate(raw[None].float() / 255, size=self.size, mode="bilinear", antialias=True)[0]
        return image, index % 1000


def _busy(
    n: int = IMAGES * BATCHES, size: int = 224, readers: int = READERS, device: str = DEVICE
) -> Mapping[str, Any]:
    from laplace_dist.data.read_ahead import ReadAhead

    data, batch = Photographs(2 * n, size), n // BATCHES
    model = resnet50().to(device)
    x, y = (t.to(device) for t in images(batch, size))
    add = _sums(model, x, y)
    alone = seconds(lambda: lambda: _synchronised(lambda: add([(x, y)] * BATCHES), device), 2)
    ahead = ReadAhead(data, batch, workers=readers)
    try:
        add((inputs, targets) for _, inputs, targets in ahead.batches(0, n))  # starts the readers
        start = time.perf_counter()
        _synchronised(lambda: add((inputs, targets) for _, inputs, targets in ahead.batches(n, 2 * n)), device)
        return {"ours": (found := time.perf_counter() - start), "of the time the device is busy": alone / found}
    finally:
        ahead.close()


ROWS = {
    "resnet50": Row(
        f"Kron MC, ResNet-50, 224 × 224 ({IMAGES})",
        lambda: _kron(resnet50, images()),
        (Target("gradient step", 1.8), Target("s for 100,000 examples", 454, "value")),
    ),
    "gpt2": Row(
        f"Kron MC, GPT-2 small, {TOKENS} tokens ({SEQUENCES})",
        lambda: _kron(gpt2, tokens()),
        (Target("gradient step", 1.8),),
    ),
    "loader": Row(
        f"Kron MC, ResNet-50, images from {READERS} readers ({IMAGES * BATCHES})",
        partial(_busy),
        (Target("of the time the device is busy", 0.9, "at least"),),
    ),
}
