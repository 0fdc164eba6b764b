"""Ten windows of MNIST, the last three rotated by 15, 30 and 45 degrees: what is noticed, promoted and kept, and what it costs.

    python benchmarks/recalibration.py --data FOLDER/OF/IDX/FILES

The network is trained on the 10,000 test images. The 60,000 training images, shuffled, are ten windows of 6,000: 4,000 for the
curvature, 1,000 to tune on, 1,000 fresh ones to compare and to watch. The first is a fit, the others are recalibrations, in
this process. Then 20 shuffles without a rotation: how often drift is noticed where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import laplace_dist
from laplace.drift import exchangeability
from laplace.drift.features import LastInputs, fit_distance
from laplace.predictive import prediction
from laplace_dist.config.settings import Config
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.recalibrations import read_decision
from laplace_dist.stages.drift import FALSE_ALARMS

WINDOWS, SIZE = 10, 6000
SPLITS = {"train": slice(0, 4000), "val": slice(4000, 5000), "test": slice(5000, 6000)}
ANGLES = {8: 15.0, 9: 30.0, 10: 45.0}


# ------------------------------------------------------------------ data and network


@functools.lru_cache
def idx(folder: str, name: str) -> np.ndarray:
    """Read an IDX file, compressed or not."""
    path = Path(folder) / name
    raw = gzip.decompress(Path(f"{path}.gz").read_bytes()) if not path.exists() else path.read_bytes()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@functools.lru_cache
def images(folder: str, part: str) -> tuple[Tensor, Tensor]:
    x = torch.tensor(idx(folder, f"{part}-images-idx3-ubyte"), dtype=torch.float32)[:, None] / 255
    return x, torch.tensor(idx(folder, f"{part}-labels-idx1-ubyte"), dtype=torch.int64)


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Turn images counterclockwise about their centre."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(x), 2, 3)
    grid = nn.functional.affine_grid(turn, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, align_corners=False)


def window(split: str, folder: str, number: int, rotate: bool = True, seed: int = 0) -> TensorDataset:
    """Return a split of a window from 1 to 10; of number 0 the union of all."""
    x, y = images(folder, "train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(SIZE)
    parts = []
    for n in [number] if number else range(1, WINDOWS + 1):
        chosen = order[n - 1][SPLITS[split]]
        parts.append((rotated(x[chosen], ANGLES.get(n, 0.0) if rotate else 0.0), y[chosen]))
    return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train(folder: str, path: str, epochs: int = 20) -> None:
    """Train on the test images until they are fitted well: a network that is too sure of itself."""
    torch.manual_seed(0)
    model, (x, y) = network(), images(folder, "t10k")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    save_file(model.state_dict(), path)


# ------------------------------------------------------------------ the schedule


def config(folder: str, weights: str, place: Path, number: int, **changes: Any) -> Config:
    given = {"folder": folder, "number": number, **changes}
    return Config(
        model="recalibration:network",
        weights=weights,
        data="recalibration:window",
        data_args=given,
        checkpoint=str(place),
        window=f"window-{number}",
        cpus_per_worker=torch.get_num_threads(),
        gpus_per_worker=0,
        keep_versions=3,
    )


def timed(call: Any) -> tuple[Any, float]:
    begun = time.process_time()  # other processes may share the cores
    with contextlib.redirect_stdout(io.StringIO()):
        found = call()
    return found, time.process_time() - begun


def schedule(folder: str, weights: str, place: Path, **changes: Any) -> list[tuple[Any, Any, float]]:
    """Fit the first window and recalibrate with the others; returns what each found, its record, and its seconds."""
    timed(lambda: laplace_dist.fit(config(folder, weights, place, 1, **changes), executor=laplace_dist.Inline))
    found = []
    for number in range(2, WINDOWS + 1):
        chosen = config(folder, weights, place, number, **changes)
        result, seconds = timed(lambda chosen=chosen: laplace_dist.recalibrate(chosen, laplace_dist.Inline))
        store = Checkpoint(str(place))
        found.append((result, read_decision(store, read_plan(store), f"window-{number}"), seconds))
        print(".", end="", file=sys.stderr, flush=True)
    return found


def show(found: list[tuple[Any, Any, float]], whole: float) -> None:
    print("| window | rotation | noticed | log evidence: entropy, features, NLL, labels (alarm at) "
          "| NLL: MAP, current, candidate | ECE: MAP, current, candidate | decision | CPU seconds | of a fit from scratch |\n"
          + "| --- " * 9 + "|")  # fmt: skip
    for number, (result, record, seconds) in enumerate(found, start=2):
        streams = record["drift"]["streams"]
        evidence = ", ".join(
            f"{streams[name]['log_evidence']:.1f}" for name in ("entropy", "features", "nll", "labels")
        )
        limit = streams["entropy"]["log_threshold"]
        figures = [
            ", ".join(f"{result.metrics[side][name]:.4f}" for side in ("map", "current", "candidate"))
            for name in ("nll", "ece")
        ]
        print(
            f"| {number} | {ANGLES.get(number, 0):.0f}° | {', '.join(result.noticed) or '–'} | {evidence} ({limit:.1f}) | "
            f"{figures[0]} | {figures[1]} | {'promoted' if result.promoted else 'kept'}: {result.why} | {seconds:.1f} | "
            f"{seconds / whole:.0%} |"
        )


# ------------------------------------------------------------------ shuffles without a shift


def scores(la: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return what is watched of every image, as `EvaluateShard` does."""
    law, found = la.likelihood_object, {}
    for part, labels in zip(x.split(500), y.split(500), strict=True):
        with torch.no_grad():
            p = prediction(la, law, part, "glm", "probit")
            with LastInputs(la.model) as last:
                la.model(part)
        values = {**law.scores(p, labels), **law.monitored(p, labels), "features": last.projected()}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in found.items()}


def alarms(all_scores: dict[str, Tensor], order: Tensor, promoted: bool, seed: int) -> int:
    """Return the number of streams and looks with an alarm in ten windows of one shuffle.

    Args:
        all_scores: Of all images.
        order: The fresh images of the windows one after the other, ``(windows, images)``.
        promoted: Every window is a new reference, as if each candidate had been promoted; else the first is for all.
        seed: Of the ties.
    """
    count, number, streams, distance = 0, 0, {}, None
    for look, chosen in enumerate(order):
        own = {name: values[chosen] for name, values in all_scores.items()}
        if look > 0:
            own["distance"] = distance(own["features"])
            streams = {name: exchangeability.look(stream, own[name], seed) for name, stream in streams.items()}
            limit = exchangeability.threshold(exchangeability.share(FALSE_ALARMS, number, len(streams)))
            count += sum(stream.log_evidence >= limit for stream in streams.values())
        if look == 0 or promoted:
            number += 1
            distance = fit_distance(own["features"][::2], own["predicted"][::2])
            own["distance"] = distance(own["features"])
            streams = {n: exchangeability.begin(own[n]) for n in ("entropy", "distance", "nll", "label")}
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="of MNIST's four IDX files, compressed or not")
    parser.add_argument("--shuffles", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = str(Path(given.data).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        place, weights = Path(scratch), f"{scratch}/weights.safetensors"
        train(folder, weights)
        found = schedule(folder, weights, place / "run")
        whole = config(folder, weights, place / "whole", 0)
        _, seconds = timed(lambda: laplace_dist.fit(whole, executor=laplace_dist.Inline))
        show(found, seconds)
        print(f"\nA fit of all ten windows from scratch, with tuning and evaluation: {seconds:.1f} CPU seconds")
        shutil.rmtree(place / "run")
        still = schedule(folder, weights, place / "run", rotate=False, seed=1)
        promoted, noticed = sum(r.promoted for r, _, _ in still), [r.noticed for r, _, _ in still if r.noticed]
        print(
            f"\nThe same without a rotation (another shuffle): {promoted} of 9 promoted, noticed: {noticed or 'nothing'}"
        )
        model = network().eval()
        la = laplace_dist.load_posterior(str(place / "run"), model, load_weights=True)
        of_all = scores(la, *images(folder, "train"))
        for promoted in (False, True):
            counts = []
            for seed in range(given.shuffles):
                order = torch.randperm(60_000, generator=torch.Generator().manual_seed(100 + seed)).split(SIZE)
                counts.append(alarms(of_all, torch.stack([part[SPLITS["test"]] for part in order]), promoted, seed))
            kind = "every window a new reference" if promoted else "the first window the reference of all"
            print(f"{given.shuffles} shuffles, {kind}: {sum(map(bool, counts))} with an alarm")


if __name__ == "__main__":
    main()
