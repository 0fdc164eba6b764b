"""What a search in rounds costs beside one pass over the whole grid, on the same posterior and data.

    python benchmarks/tuning_rounds.py

Random images and a small convolutional network, one thread, CPU seconds: 41 prior precisions in one pass, against the two
rounds of a search whose best value lies inside (a sixteenth of the batches, then all, every score kept).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from laplace import Laplace
from laplace.scoring import score_candidates
from laplace.search import Lattice
from laplace.tuning import prior_precision_grid, score_grid

CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("last_layer", 2048, 128, {}),
    ("last_layer", 2048, 128, {"link_approx": "mc"}),
    ("last_layer", 2048, 128, {"pred_type": "nn", "link_approx": "mc", "n_samples": 20}),
    ("all", 512, 32, {}),
]


def network() -> nn.Module:
    """Two convolutions and two linear layers, 61,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1176, 42), nn.ReLU(), nn.Linear(42, 10),
    )  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of the second of two calls."""
    for _ in range(2):
        start = time.process_time()
        work()
        spent = time.process_time() - start
    return spent


def main() -> None:
    """Print one row for each case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| weights | predictive | images | one pass, 41 values | rounds |\n| --- | --- | --- | --- | --- |")
    for subset, n, batch, how in CASES:
        torch.manual_seed(0)
        batches = list(zip(torch.randn(n, 1, 28, 28).split(batch), torch.randint(10, (n,)).split(batch), strict=True))
        la = Laplace(network(), "classification", subset, "kron")
        la.fit(batches[:2])
        lattice = Lattice()
        coarse, fine = ([lattice.value(i) for i in some] for some in (lattice.coarse(), lattice.around(20)))

        def rounds(la=la, batches=batches, coarse=coarse, fine=fine, how=how) -> None:
            score_candidates(la, batches[::16], coarse, **how)
            score_candidates(la, batches, fine, keep=True, **how)

        grid = prior_precision_grid(size=41)
        whole = seconds(lambda la=la, batches=batches, grid=grid, how=how: score_grid(la, batches, grid, **how))
        shown = ", ".join(str(value) for value in how.values()) or "glm, probit"
        print(f"| {subset} | {shown} | {n} | {whole:.2f} s | {seconds(rounds):.2f} s |", flush=True)


if __name__ == "__main__":
    main()
