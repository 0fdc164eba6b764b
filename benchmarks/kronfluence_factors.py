"""The factors of an empirical Fisher beside kronfluence's covariances: the same numbers, CPU time, wall time, peak memory.

    python benchmarks/kronfluence_factors.py --peer-python PEER/bin/python --turns 3

Labels are those of the data, so that both sides see the same gradients. Kronfluence appends a one to the inputs of a layer with
a bias, and divides by numbers of examples or positions at the end; compared is what both have, the inputs without the one, each
factor relative to its trace.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "rows"))
from problems import cnn, mlp, problem  # noqa: E402

SIZES = {"mlp": (mlp, 4096, 256), "cnn": (cnn, 1024, 128)}


def ours(name: str) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
    """Return the factors by layer, and what computes them."""
    from laplace import Laplace
    from laplace.curvature import backend_class

    model, loader = problem(*SIZES[name])
    cls, kwargs = backend_class("native", "ef")
    la = Laplace(model, "classification", "all", "kron", backend=cls, backend_kwargs=kwargs)

    def run() -> dict[str, tuple[Tensor, Tensor]]:
        la.fit(loader)
        factors = {block.layer: block.factors for block in la.sums.spec.blocks if block.parameter.endswith("weight")}
        tensors = la.sums.tensors
        return {
            layer: tuple(tensors[name] for name in sorted(names, key=lambda name: not name.endswith("/A")))
            for layer, names in factors.items()
        }

    return run


def kronfluence(name: str) -> Any:
    """Return what has kronfluence compute its covariances."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            return F.cross_entropy(model(x), y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    model, loader = problem(*SIZES[name])
    task = Classification()
    folder = tempfile.mkdtemp()
    analyzer = Analyzer("factors", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
    arguments = FactorArguments(covariance_max_examples=None, use_empirical_fisher=True)

    def run() -> dict[str, tuple[Tensor, Tensor]]:
        analyzer.fit_covariance_matrices(
            "factors", loader.dataset, per_device_batch_size=SIZES[name][2], factor_args=arguments,
            overwrite_output_dir=True,
        )  # fmt: skip
        found = analyzer.load_covariance_matrices("factors")
        a, g = found["activation_covariance"], found["gradient_covariance"]
        return {layer: (a[layer][:-1, :-1], g[layer]) for layer in a}

    return run


def side(which: str, name: str, threads: int, out: str) -> None:
    """Run one side once to warm up and once more; keep its factors and print what it took."""
    torch.set_num_threads(threads)
    run = {"ours": ours, "kronfluence": kronfluence}[which](name)
    run()
    wall, cpu = time.perf_counter(), time.process_time()
    factors = run()
    took = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    torch.save(factors, out)
    print(json.dumps({**took, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def difference(one: dict, two: dict) -> float:
    """Return the largest relative difference of two factors of one layer, in Frobenius norm, each relative to its trace."""
    assert one.keys() == two.keys(), f"layers differ: {sorted(one)} and {sorted(two)}"
    found = 0.0
    for layer, pair in one.items():
        for mine, other in zip(pair, two[layer], strict=True):
            mine, other = (value.double() / value.double().trace() for value in (mine, other))
            found = max(found, float((mine - other).norm() / other.norm()))
    return found


def main() -> None:
    """Compare the two sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of an environment with kronfluence 1.0.1 and the same torch")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "MODEL", "FILE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        side(chosen.side[0], chosen.side[1], chosen.threads, chosen.side[2])
        return
    if not chosen.peer_python:
        parser.error("--peer-python is needed")
    print(
        "| model | ours | kronfluence | kronfluence / ours | CPU | peak memory | largest difference |",
        "| - " * 7,
        sep="\n",
    )
    for name in SIZES:
        took: dict[str, list[dict[str, float]]] = {"ours": [], "kronfluence": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(chosen.turns):
                for which, python in (("ours", sys.executable), ("kronfluence", chosen.peer_python)):
                    command = [
                        python,
                        __file__,
                        "--threads",
                        str(chosen.threads),
                        "--side",
                        which,
                        name,
                        f"{folder}/{which}",
                    ]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"{which} failed:\n{done.stderr}")
                    took[which].append(json.loads(done.stdout.splitlines()[-1]))
            factors = [torch.load(f"{folder}/{which}", weights_only=True) for which in took]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(*took.values(), strict=True)]
        mid = {k: {u: statistics.median(t[u] for t in v) for u in ("seconds", "cpu", "mib")} for k, v in took.items()}
        a, b = mid["ours"], mid["kronfluence"]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = f"{a['mib']:.0f} / {b['mib']:.0f} MiB"
        print(
            f"| {name} | {a['seconds']:.2f} s | {b['seconds']:.2f} s | {spread} | {b['cpu'] / a['cpu']:.2f} | {memory} | "
            f"{difference(*factors):.1e} |"
        )


if __name__ == "__main__":
    main()
