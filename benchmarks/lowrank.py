"""Low-rank posteriors of the demo's network: sketches in two passes against block Lanczos in many, and the dense matrix.

    python benchmarks/lowrank.py

CPU seconds on one thread, the smallest of three runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

from laplace import Laplace, LowRankLaplace, SketchedLowRankLaplace
from laplace.curvature import NativeGGN
from laplace_dist import demo

RANKS = ((20, 10), (100, 20), (300, 50))
SEARCHED = 20  # rank up to which the search in many passes is run too: it takes minutes beyond


def seconds(call: Callable[[], None]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def lanczos(network: nn.Module, rank: int) -> LowRankLaplace:
    arguments = {"backend": NativeGGN, "backend_kwargs": {"low_rank": rank}}
    return Laplace(network, "classification", "all", "lowrank", **arguments)


def main() -> None:
    torch.set_num_threads(1)
    network, loader = demo.trained_network(), DataLoader(demo.digits("train"), batch_size=64)
    full = Laplace(network, "classification", "all", "full")
    full.fit(loader)
    truth = torch.linalg.eigvalsh(full.sums.tensors["full"]).flip(0)
    print(
        "rank + oversampling | sketch s | Lanczos s | error of eigenvalue 1 | 5 | last | share of the trace | of the best"
    )
    for rank, oversampling in RANKS:
        sketch = SketchedLowRankLaplace(network, "classification", rank=rank, oversampling=oversampling)
        ours = min(seconds(lambda la=sketch: la.fit(loader)) for _ in range(3))
        peer = (
            min(seconds(lambda r=rank: lanczos(network, r).fit(loader)) for _ in range(3)) if rank <= SEARCHED else None
        )
        values = sketch.H[1].double()
        errors = 1 - values / truth[: len(values)]
        shares = float(values.sum() / truth.sum()), float(truth[:rank].sum() / truth.sum())
        print(
            f"{rank} + {oversampling} | {ours:.2f} | {'not run' if peer is None else f'{peer:.2f}'} | "
            f"{errors[0]:.1e} | {errors[4]:.1e} | {errors[-1]:.2f} | {shares[0]:.3f} | {shares[1]:.3f}"
        )


if __name__ == "__main__":
    main()
