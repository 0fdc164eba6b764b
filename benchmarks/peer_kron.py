"""Time exact-GGN Kron fits of an MLP: this library or laplace-torch, whichever this interpreter has.

Run by ``kron_fit.py``, which starts it once in each environment and pairs the times. The peer is used through its public
interface only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def problem() -> tuple[nn.Module, DataLoader]:
    """MLP 784-1024-1024-10 with random weights, 4,096 random examples, batches of 256."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    data = TensorDataset(torch.rand(4096, 784), torch.randint(0, 10, (4096,)))
    return model, DataLoader(data, batch_size=256)


def ours(model: nn.Module):
    """A factory of posteriors by name."""
    from laplace import Laplace
    from laplace.curvature import backend_class

    def make(backend: str):
        cls, kwargs = backend_class(backend, "ggn")
        return Laplace(model, "classification", "all", "kron", backend=cls, backend_kwargs=kwargs)

    return {"native": lambda: make("native"), "curvlinops": lambda: make("curvlinops")}


def theirs(model: nn.Module):
    """The peer's backends that compute the exact GGN's Kronecker factors."""
    from laplace import Laplace
    from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

    def make(backend):
        return Laplace(model, "classification", "all", "kron", backend=backend)

    return {
        "curvlinops": lambda: make(CurvlinopsGGN),
        "asdl": lambda: make(AsdlGGN),
        "backpack": lambda: make(BackPackGGN),
    }


def main() -> None:
    """Print the seconds of every run of every backend as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--which", choices=["ours", "theirs"], required=True)
    parser.add_argument("--backends", nargs="*")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    library = {"ours": ours, "theirs": theirs}[arguments.which]
    result: dict[str, dict[str, list[float]]] = {}
    for name in arguments.backends or list(library(problem()[0])):
        seconds: dict[str, list[float]] = {"fit": [], "fit+evidence": []}
        for _ in range(arguments.runs + 1):
            model, loader = problem()  # a fresh model: some backends leave hooks on the one they are given
            la = library(model)[name]()
            start = time.perf_counter()
            la.fit(loader)
            seconds["fit"].append(time.perf_counter() - start)
            la.log_marginal_likelihood()
            seconds["fit+evidence"].append(time.perf_counter() - start)
        result[name] = {what: values[1:] for what, values in seconds.items()}
        print(name, {w: [round(s, 3) for s in v] for w, v in seconds.items()}, file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
