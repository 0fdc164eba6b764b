"""Tuning and evaluation beside the map phase, as jobs, on random images: 1,024 to fit, 256 to tune on, 256 to evaluate.

    python benchmarks/follow_on.py [resnet-diag] [vit-kron] [resnet-kron-100]

One thread, no Ray, CPU seconds of the whole job less what it takes to run it again when everything is done (data, model,
checks). The last columns are what tuning and evaluation take for as many examples as the map has, over the map: measured, and
by the operations of float32 products that both need at least, where all values that are searched cost what one does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import VisionTransformer, resnet18

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "rows")]
SIZES = {"train": 1024, "val": 256, "test": 256}
EXACT = 64  # outputs, of more of which the map draws a label instead of taking the exact curvature
CASES: dict[str, tuple[str, str, int]] = {
    "resnet-diag": ("resnet", "diag", 10),
    "vit-kron": ("vit", "kron", 10),
    "resnet-kron-100": ("resnet", "kron", 100),
}


def resnet(classes: int) -> nn.Module:
    """ResNet-18."""
    torch.manual_seed(0)
    return resnet18(num_classes=classes).eval()


def vit(classes: int) -> nn.Module:
    """A ViT of dimension 192 and depth 6 over patches of 4 × 4."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 4, 6, 3, 192, 768, num_classes=classes).eval()
    model.heads.head.reset_parameters()
    return model


def images(split: str, classes: int) -> TensorDataset:
    """Images of 3 × 32 × 32 with labels that the brightness of their thirds gives."""
    generator = torch.Generator().manual_seed(len(split))
    x = torch.rand(SIZES[split], 3, 32, 32, generator=generator)
    return TensorDataset(x, torch.randint(classes, (len(x),), generator=generator))


def spent(job: Callable[..., Any], config: Any) -> float:
    """CPU seconds of a job beyond those of the same job when everything is done."""
    from laplace_dist import Inline

    found = []
    for _ in range(2):
        start = time.process_time()
        job(config, executor=Inline)
        found.append(time.process_time() - start)
    return found[0] - found[1]


def stages(case: str, place: str) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Return the jobs of a case over one checkpoint by name, each with its settings, in the order in which they are run."""
    import laplace_dist
    from laplace_dist.job import evaluate_posterior, tune_posterior

    model, structure, classes = CASES[case]
    config = laplace_dist.Config(
        model=f"follow_on:{model}", model_args={"classes": classes}, data="follow_on:images",
        data_args={"classes": classes}, checkpoint=place, hessian_structure=structure, batch_size=32,
        device="cpu", skip_tune=True, skip_evaluate=True, ood=[],
    )  # fmt: skip
    follow = config.model_copy(update={"skip_tune": False, "skip_evaluate": False})
    return {
        "map": (laplace_dist.fit, config),
        "tune": (tune_posterior, follow),
        "evaluate": (evaluate_posterior, follow),
    }


def measured(case: str) -> tuple[float, float, float]:
    """Return the CPU seconds of the map, the tuning and the evaluation of a case."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        mapped, tuned, evaluated = (spent(job, config) for job, config in stages(case, place).values())
    return mapped, tuned, evaluated


def least(case: str) -> float:
    """Return the operations of tuning and evaluation over those of the map, of as many examples."""
    from operations import diag_gflop, kron_gflop, variance_gflop

    model, structure, classes = CASES[case]
    network, x = globals()[model](classes), torch.rand(2, 3, 32, 32)
    columns = classes - 1 if classes <= EXACT else 1
    mapped = {"kron": kron_gflop, "diag": diag_gflop}[structure](network, x, columns)
    return 2 * variance_gflop(network, x, classes, structure == "kron") / mapped


def prepared(case: str, stage: str) -> Callable[[], object]:
    """Return what carries out one stage of a case, of which the ones before are done."""
    from laplace_dist import Inline

    place = tempfile.TemporaryDirectory()
    jobs = stages(case, place.name)
    for name, (job, config) in jobs.items():
        if name == stage:
            return lambda place=place: job(config, executor=Inline)  # the folder stays as long as this does
        job(config, executor=Inline)
    raise ValueError(f"{stage!r} is none of {', '.join(jobs)}")


def main() -> None:
    """Print one row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    print(
        "| case | map | tune | evaluate | of as many examples, tune and evaluate / map | by operations |",
        "| - " * 6 + "|",
        sep="\n",
    )
    for name in parser.parse_args().cases:
        took = measured(name)
        each = [seconds / size for seconds, size in zip(took, SIZES.values(), strict=True)]
        times = " | ".join(f"{seconds:.1f} s" for seconds in took)
        print(f"| {name} | {times} | {(each[1] + each[2]) / each[0]:.2f} | {least(name):.2f} |", flush=True)


if __name__ == "__main__":
    main()
