"""Rows of a CUDA device: Kron MC of ResNet-50 and of GPT-2 in gradient steps, and how busy the loader keeps the device.

Published beside the first: curvlinops, 2.6 gradient steps eager and 1.8 compiled on an A6000; kronfluence, 454 s for 100,000
images on an A100.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Prepare, Row, Target, seconds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import efficientnet  # noqa: E402
from tf32 import EmulatedTf32  # noqa: E402

DEVICE, OUTPUTS = "cuda", "outputs"
IMAGES, BATCHES, READERS = 64, 32, 8
TOKENS, SEQUENCES = 256, 8


def resnet50(norms: bool = True) -> nn.Module:
    """ResNet-50 with random weights; without ``norms``, of convolutions and the linear layer alone, as peers have it."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(norms)
    return model


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


def _in_float32() -> None:
    """Compute as `--precision float32` does: without TF32, which convolutions have by default."""
    from laplace.linalg.precision import use_products_in

    use_products_in("ieee")


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
    la = _posterior(model)
    la.initialize(x)
    sums = la.zero_sums()

    def add(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for inputs, targets in batches:
            la.accumulate(sums, inputs.to(x.device, non_blocking=True), targets.to(x.device, non_blocking=True))

    return add


def _posterior(model: nn.Module, estimator: str = "mc") -> Any:
    from laplace import Laplace
    from laplace.curvature import backend_class

    cls, kwargs = backend_class("native", estimator)
    return Laplace(model, "classification", "all", "kron", backend=cls, backend_kwargs=kwargs)


def _kron(
    make: Callable[[], nn.Module], data: tuple[Tensor, Tensor], device: str = DEVICE, peers: bool = False
) -> Mapping[str, Prepare | float]:
    _in_float32()
    model, (x, y) = make().to(device), (t.to(device) for t in data)
    add = _sums(model, x, y)
    ours = _seconds(lambda: add([(x, y)]), device)
    found = {"ours": ours, "gradient step": _seconds(lambda: _step(model, x, y), device)}
    if peers:
        found["curvlinops"] = _seconds(_curvlinops(model, x, y), device)
        found["kronfluence"] = _kronfluence(model, x, y, device)
    return {**found, "s for 100,000 examples": 1e5 * ours / len(x)}


def _seconds(call: Callable[[], object], device: str) -> float:
    return seconds(lambda: lambda: _synchronised(call, device), 5)


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Return what computes the same factors with curvlinops."""
    from curvlinops import KFACLinearOperator

    params = [p for p in model.parameters() if p.requires_grad]
    loss = nn.CrossEntropyLoss(reduction="sum")
    return lambda: KFACLinearOperator(
        model, loss, params, [(x, y)], check_deterministic=False
    ).compute_kronecker_factors()


def _kronfluence(model: nn.Module, x: Tensor, y: Tensor, device: str) -> float:
    """Return the seconds of kronfluence for one batch, out of a fit of several."""
    from kron import covariances

    again = 4
    data = TensorDataset(x.cpu().repeat(again, 1, 1, 1), y.cpu().repeat(again))
    return seconds(lambda: covariances(copy.deepcopy(model), data, len(x), cpu=device == "cpu"), 1) / again


def _rounded(precision: str, device: str = DEVICE) -> Mapping[str, float]:
    """Time a batch of a real model, and compare outputs and factors with those in float32."""
    model, (x, y) = efficientnet.network().to(device), (t.to(device) for t in efficientnet.crops("train").tensors)
    with _products_in(precision, device):
        add = _sums(model, x, y)
        ours = _seconds(lambda: add([(x, y)]), device)
    step = _seconds(lambda: _step(model, x, y), device)
    return {"ours": ours, "gradient step": step, **errors(precision, device)}


def errors(precision: str, device: str = DEVICE) -> Mapping[str, float]:
    """Compare outputs and factors of a real model with those in float32; on a CPU, TF32 is emulated.

    The factors are of the empirical Fisher, of which nothing is drawn: where outputs are rounded, other labels are.
    """
    model, (x, y) = efficientnet.network().to(device), (t.to(device) for t in efficientnet.crops("train").tensors)
    with _products_in("ieee", device):
        exact = _outputs_and_sums(model, x, y)
    with _products_in(precision, device), EmulatedTf32() if device == "cpu" else nullcontext():
        found = _outputs_and_sums(model, x, y)
    off = {name: _relative(found[name], value) for name, value in exact.items()}
    outputs, (*_, largest) = off.pop(OUTPUTS), sorted(off.values())
    return {
        "error of the outputs": outputs,
        "median error of a factor": statistics.median(off.values()),
        "largest error of a factor": largest,
    }


@contextmanager
def _products_in(precision: str, device: str) -> Iterator[None]:
    from laplace.linalg.precision import products_in

    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with products_in("tf32" if precision == "tf32" else "ieee"), autocast:
        yield


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def _outputs_and_sums(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    la = _posterior(model, "ef")
    la.initialize(x)
    sums = la.zero_sums()
    la.accumulate(sums, x, y)
    with torch.no_grad():
        return {**sums.tensors, OUTPUTS: model(x)}


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

    _in_float32()
    data, batch = Photographs(2 * n, size), n // BATCHES
    model = resnet50().to(device)
    x, y = (t.to(device) for t in images(batch, size))
    add = _sums(model, x, y)
    alone = seconds(lambda: lambda: _synchronised(lambda: add([(x, y)] * BATCHES), device), 2)
    ahead = ReadAhead(data, batch, workers=readers, pin=device == "cuda")
    try:
        add((inputs, targets) for _, inputs, targets in ahead.batches(0, n))  # starts the readers
        start = time.perf_counter()
        _synchronised(lambda: add((inputs, targets) for _, inputs, targets in ahead.batches(n, 2 * n)), device)
        return {"ours": (found := time.perf_counter() - start), "of the time the device is busy": alone / found}
    finally:
        ahead.close()


def _rounded_row(precision: str, bound: float) -> Row:
    """Return a row of a precision, whose targets are what a user would want to know before choosing it."""
    return Row(
        f"Kron MC, EfficientNet-Lite0, --precision {precision} ({IMAGES})",
        partial(_rounded, precision),
        (
            Target("gradient step", 1.8),
            Target("error of the outputs", bound, "value"),
            Target("median error of a factor", bound, "value"),
            Target("largest error of a factor", 10 * bound, "value"),
        ),
    )


ROWS = {
    "float32": Row(
        f"Kron MC, EfficientNet-Lite0 ({IMAGES})",
        lambda: _kron(efficientnet.network, efficientnet.crops("train").tensors),
        (Target("gradient step", 1.8),),
    ),
    "resnet50": Row(
        f"Kron MC, ResNet-50 without norms, 224 × 224 ({IMAGES})",
        lambda: _kron(partial(resnet50, norms=False), images(), peers=True),
        (
            Target("gradient step", 1.8),
            Target("s for 100,000 examples", 454, "value"),
            Target("curvlinops", 1.7, "faster"),
            Target("kronfluence", 1.7, "faster"),
        ),
    ),
    "resnet50-norms": Row(
        f"Kron MC, ResNet-50, 224 × 224 ({IMAGES})",
        lambda: _kron(resnet50, images()),
        (Target("gradient step", 1.8),),
    ),
    "tf32": _rounded_row("tf32", 0.01),
    "bf16": _rounded_row("bf16", 0.1),
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
