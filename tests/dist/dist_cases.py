"""Models, data sets that misbehave on demand, and a pool without Ray, for the tests of whole runs.

Workers import this module, so the data sets here act only in a Ray worker and talk to the test through files.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from laplace_dist import stages
from laplace_dist.config.settings import Config
from laplace_dist.execution.inline import Inline
from laplace_dist.job import Job

N = 44


def convnet(dtype: str = "float32") -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    return nn.Sequential(*layers).to(getattr(torch, dtype)).eval()


def tensors(split: str, dtype: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}.get(split, 3))
    n = N if split == "train" else 20
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = (x.mean((1, 2, 3)) * 8 + 1.5).long().clamp(0, 2)
    return x.to(getattr(torch, dtype)), y


def blobs(split: str, dtype: str = "float32") -> TensorDataset:
    return TensorDataset(*tensors(split, dtype))


def second_window(split: str, dtype: str = "float32") -> TensorDataset:
    """Return other examples for training, and the same ones else."""
    x, y = tensors(split, dtype)
    return TensorDataset(x + 1 if split == "train" else x, y)


def regression_data(split: str) -> TensorDataset:
    x, _ = tensors(split)
    return TensorDataset(x, torch.stack([x.sum((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 0, 0]], dim=1))


TINY = {
    "one parameter": lambda: nn.Sequential(nn.Linear(1, 1, bias=False)),
    "one input, one output": lambda: nn.Sequential(nn.Linear(1, 1)),
    "one output": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    "one unit": lambda: nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)),
    "one input": lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)),
    "one channel": lambda: nn.Sequential(nn.Conv1d(1, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(3, 1)),
}


def tiny(name: str) -> nn.Module:
    """Return a network in which some factor is 1 x 1."""
    torch.manual_seed(2)
    return TINY[name]().double().eval()


def tiny_data(split: str, name: str) -> TensorDataset:
    """Return a regression set that fits `tiny(name)`."""
    generator = torch.Generator().manual_seed(3)
    width = {"one parameter": (1,), "one input, one output": (1,), "one input": (1,), "one channel": (1, 3)}
    x = torch.randn(30, *width.get(name, (3,)), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = tiny(name)(x)
    return TensorDataset(x, y + 0.1 * torch.randn(y.shape, generator=generator, dtype=torch.float64))


class Coupled(nn.Module):
    """Examples attend to one another where inputs are large, which those of `blobs` are not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.head = nn.Linear(36, 3), nn.Linear(36, 3)

    def forward(self, x):
        h = (self.inner(x.flatten(1)) - 100).relu()
        return self.head(x.flatten(1)) + (h @ h.T).softmax(-1) @ h


def train_only(split: str) -> TensorDataset:
    if split != "train":
        raise ValueError(f"there is no split {split!r}")
    return blobs(split)


def with_nan(split: str, at: int) -> TensorDataset:
    x, y = tensors(split)
    if split == "train":
        x[at] = float("nan")
    return TensorDataset(x, y)


def spoilt(split: str, bad: str, at: int, how: str) -> TensorDataset:
    """Return a split of which, if it is the bad one, one example has an input or a label that cannot be."""
    x, y = tensors(split)
    if split == bad and how == "input":
        x[at] = float("nan")
    elif split == bad:
        y[at] = 7
    return TensorDataset(x, y)


class _Unreadable(TensorDataset):
    def __init__(self, *tensors: torch.Tensor, at: int) -> None:
        super().__init__(*tensors)
        self.at = at

    def __getitem__(self, index):
        if index == self.at or (isinstance(index, slice) and self.at in range(len(self))[index]):
            raise OSError("the disk of this data set is gone")
        return super().__getitem__(index)


def unreadable(split: str, bad: str, at: int) -> TensorDataset:
    """Return a split of which, if it is the bad one, one example cannot be read in any process."""
    return _Unreadable(*tensors(split), at=at) if split == bad else blobs(split)


def in_worker() -> bool:
    return os.path.basename(sys.argv[0]) == "default_worker.py"


def only_compared() -> bool:
    """Say whether this process reads an example just now to compare data sets, and not to add it to a sum."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals["__name__"] == "laplace_dist.plan.identity" or frame.f_code.co_qualname == "CompareData.run":
            return True
        frame = frame.f_back
    return False


class Watched(Dataset):
    """Notes which examples workers read, and calls `at_trap` when they read the example `trap`.

    Unless asked to, a worker commits a segment before it begins the next, so that a fault concerns one segment.
    """

    def __init__(self, split: str, folder: str, trap: int = -1, beside: bool = False) -> None:
        if not beside:
            stages.map.BESIDE = 0
        self.folder, self.trap = Path(folder), trap
        self.x, self.y = tensors(split)
        self.watch = split == "train"

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.watch and in_worker() and not only_compared():
            with open(self.folder / f"reads-{os.getpid()}", "a") as file:
                file.write(f"{index}\n")
            if index == self.trap:
                self.at_trap()
        return self.x[index], self.y[index]

    def at_trap(self) -> None:
        pass


class Blocking(Watched):
    """At the trap, says which process is there and waits until the test says `go`."""

    def at_trap(self) -> None:
        (self.folder / f"waiting-{os.getpid()}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.01)


class BlockingOnce(Watched):
    """The first process to reach the trap stays there; later ones pass."""

    def at_trap(self) -> None:
        try:
            (self.folder / "held").touch(exist_ok=False)
        except FileExistsError:
            return
        while True:
            time.sleep(1)


class Deadly(Watched):
    """Kills the process that reads the trap."""

    def at_trap(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyOnce(Watched):
    """Kills the first process that reads the trap; later ones pass."""

    def at_trap(self) -> None:
        try:
            (self.folder / "killed").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyInSecondPass(Watched):
    """Kills the first process that reads the trap once a run's second pass has begun."""

    def __init__(self, split: str, folder: str, run: str, trap: int) -> None:
        super().__init__(split, folder, trap)
        self.run = Path(run)

    def at_trap(self) -> None:
        if not any(self.run.glob("passes/*/plan.json")):
            return
        try:
            (self.folder / "killed").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class Failing(Watched):
    """Raises an error at the trap, until it is mended."""

    def at_trap(self) -> None:
        if not (self.folder / "mended").exists():
            raise OSError("the disk of this data set is gone")


def wait_for(folder: Path, pattern: str, seconds: float = 120.0) -> Path:
    """Wait until a file of this pattern exists, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in folder.glob(pattern):
            return path
        time.sleep(0.01)
    raise AssertionError(f"no file {pattern} in {folder} after {seconds} s")


def config(checkpoint, **changes) -> Config:
    values = {
        "model": "dist_cases:convnet",
        "data": "dist_cases:blobs",
        "batch_size": 4,
        "segment_size": 8,
        "gpus_per_worker": 0.0,
        "checkpoint": str(checkpoint),
        "skip_tune": True,
        "skip_evaluate": True,
        "skip_report": True,
    }
    return Config(**{**values, **changes})


def inline_job(chosen: Config) -> Job:
    """Return a job whose tasks are carried out in this process, and which says nothing."""
    return Job(chosen, Inline, say=lambda text: None)


def run_inline(chosen: Config) -> tuple:
    """Carry out the stages that the settings ask for, without Ray; returns the posterior version and the metrics."""
    with inline_job(chosen) as job:
        job.open()
        job.map()
        version = job.reduce()
        tuning = None if chosen.skip_tune else job.tune(version)
        return version, None if chosen.skip_evaluate else job.evaluate(version, tuning)


def load_sums(folder) -> dict[str, torch.Tensor]:
    """Return the raw sums of the posterior of `convnet` in a folder, by factor."""
    from laplace_dist import load_posterior

    return load_posterior(str(folder), convnet()).sums.to_tensors()
