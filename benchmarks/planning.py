"""What `jobs/plan.py` says of a fit, against what the fit takes: peak memory of a worker, and time, of three models.

    python benchmarks/planning.py

Plan and fit have a process of their own each, one after the other on the same machine; the fit is a job on a private Ray
cluster with one worker of one thread. Memory is the worker's own peak, as the kernel counts it. Time is the worker's CPU time
between the commits of the first and the last segment, for all of them, so that its start is left out; on a machine that others
use too, the time on the clock says little, and is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

BATCH, SEGMENTS = 32, 6
MODELS = {"MLP": 96, "CNN": 48, "ViT": 24}  # batches


def network(name: str) -> nn.Module:
    """A network with random weights: an MLP of 3.6, a CNN of 0.4, a vision transformer of 0.2 million weights."""
    torch.manual_seed(0)
    if name == "MLP":
        wide = [nn.Linear(3 * 32 * 32, 768), nn.ReLU(), nn.Linear(768, 1536), nn.ReLU(), nn.Linear(1536, 10)]
        return nn.Sequential(nn.Flatten(), *wide)
    if name == "CNN":
        sizes = [(3, 32), (32, 64), (64, 128), (128, 256)]
        layers = [[nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)] for a, b in sizes]
        return nn.Sequential(*[layer for some in layers for layer in some], nn.Flatten(), nn.Linear(256 * 4, 10))
    from torchvision.models.vision_transformer import VisionTransformer

    shape = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 96, "mlp_dim": 192}
    model = VisionTransformer(**shape, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def images(split: str, name: str, folder: str) -> TensorDataset:
    """Random images and labels; a Ray worker that asks for them says which process it is."""
    if os.path.basename(sys.argv[0]) == "default_worker.py":
        Path(folder, f"worker-{os.getpid()}").touch()
    n, generator = BATCH * MODELS[name], torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 3, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator))


def settings(name: str, folder: Path):
    """Settings of the plan and of the fit."""
    from laplace_dist import Config

    return Config(
        model="planning:network",
        model_args={"name": name},
        data="planning:images",
        data_args={"name": name, "folder": str(folder)},
        checkpoint=str(folder / "run"),
        batch_size=BATCH,
        segment_size=BATCH * MODELS[name] // SEGMENTS,
        num_workers=1,
        ray_address="local",
        skip_tune=True,
        skip_evaluate=True,
        skip_report=True,
    )


def plan(name: str, folder: Path) -> dict[str, float]:
    """What the plan says."""
    import laplace_dist

    found = laplace_dist.estimate(settings(name, folder))
    return {"peak": found.peak_bytes, "map": found.map_seconds, "reduce": found.reduce_seconds}


def fit(name: str, folder: Path) -> dict[str, float]:
    """What the fit takes."""
    import laplace_dist

    watch = Watch(folder)
    laplace_dist.fit(settings(name, folder))
    watch.end()
    commits = sorted(path.stat().st_mtime for path in (folder / "run" / "partials").glob("*.json"))
    share = len(commits) / (len(commits) - 1)
    used = watch.cpu_at(commits[-1]) - watch.cpu_at(commits[0])
    return {"peak": watch.peak, "map": used * share, "clock": (commits[-1] - commits[0]) * share}


class Watch:
    """Looks at the worker until it ends: its peak memory, and the CPU seconds that it has used."""

    def __init__(self, folder: Path):
        """Begin."""
        self.peak, self._folder = 0, folder
        self._used: list[tuple[float, float]] = []  # when, CPU seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            for path in self._folder.glob("worker-*"):
                try:
                    process = Path("/proc", path.name.removeprefix("worker-"))
                    lines = (process / "status").read_text().splitlines()
                    times = (process / "stat").read_text().rpartition(")")[2].split()
                except OSError:  # it has ended
                    continue
                high = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
                self.peak = max([self.peak, *(1024 * value for value in high)])
                self._used.append((time.time(), (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")))

    def cpu_at(self, when: float) -> float:
        """CPU seconds that the worker had used by then."""
        return max(used for at, used in self._used if at <= when)

    def end(self) -> None:
        """Stop looking."""
        self._over.set()
        self._thread.join()


def main() -> None:
    """Print the table, or in a process of its own one part of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("plan", "fit"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    given = parser.parse_args()
    if given.part:
        import planning  # the module that a worker imports, not this script

        print(json.dumps(getattr(planning, given.part)(given.models[0], given.folder)))
        return
    print(
        f"{'model':6} {'peak, said':>11} {'found':>8} {'ratio':>6}   {'map, said':>10} {'found':>8} {'ratio':>6} {'clock':>8}"
    )
    for name in given.models:
        found = {}
        for part in ("plan", "fit"):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--part", part, "--folder", folder, name]
                begun = time.time()
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[part] = json.loads(done.stdout.splitlines()[-1])
                print(f"  {name} {part}: {found[part]}, {time.time() - begun:.0f} s in all", file=sys.stderr)
        said, took = found["plan"], found["fit"]
        print(
            f"{name:6} {said['peak'] / 1e6:8.0f} MB {took['peak'] / 1e6:5.0f} MB {said['peak'] / took['peak']:6.2f}   "
            f"{said['map']:8.1f} s {took['map']:6.1f} s {said['map'] / took['map']:6.2f} {took['clock']:6.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
