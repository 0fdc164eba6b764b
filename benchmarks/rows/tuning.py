"""Grid searches and evidences, against laplace-torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from harness import Prepare, Row, Target
from problems import cnn, mlp, problem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _search(values: int, examples: int = 8, **options: Any) -> Callable[[], object]:
    from laplace import Laplace

    model, loader = problem(cnn, 128, 64)
    la = Laplace(model, "classification", "all", "kron", **options)
    la.fit(loader)
    x, y = next(iter(loader))
    validation = DataLoader(TensorDataset(x[:examples], y[:examples]), batch_size=examples)
    la(x[:1])  # decomposes
    how = {"method": "gridsearch", "pred_type": "glm", "grid_size": values, "val_loader": validation}
    return lambda: la.optimize_prior_precision(**how)


def _search_peers() -> Mapping[str, Prepare]:
    from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

    found = {"curvlinops": CurvlinopsGGN, "asdl": AsdlGGN, "backpack": BackPackGGN}
    return {name: partial(_search, 20, backend=backend) for name, backend in found.items()}


def _small_head() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


def _evidences(**options: Any) -> Callable[[], object]:
    from laplace import Laplace

    torch.manual_seed(0)
    la = Laplace(_small_head(), "classification", "last_layer", "full", **options)
    la.fit(DataLoader(TensorDataset(torch.rand(512, 256), torch.randint(10, (512,))), batch_size=128))
    return lambda: la.optimize_prior_precision(method="marglik", n_steps=100)


def _evidence_peers() -> Mapping[str, Prepare]:
    from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

    found = {"curvlinops": CurvlinopsGGN, "asdl": AsdlGGN, "backpack": BackPackGGN}
    return {name: partial(_evidences, backend=backend) for name, backend in found.items()}


def _first_evidence() -> Callable[[], object]:
    from laplace import Laplace

    model, loader = problem(mlp, 1024, 256)
    la = Laplace(model, "classification", "all", "kron")
    la.fit(loader)
    return la.log_marginal_likelihood


ROWS = {
    "grid": Row(
        "Grid search, 20 values, CNN (8)",
        lambda: {"ours": partial(_search, 20)},
        (Target("peer", 200),),
        _search_peers,
    ),
    "grid-100": Row(
        "Grid search, 100 values against one, CNN (8)",
        lambda: {"ours": partial(_search, 100), "value": partial(_search, 1)},
        (Target("value", 1.5),),
    ),
    "evidence": Row(
        "Evidence of a full last layer (P = 2,570), 100 steps",
        lambda: {"ours": _evidences},
        (Target("peer", 40),),
        _evidence_peers,
    ),
    "first-evidence": Row(
        "First evidence after a Kron fit, MLP", lambda: {"ours": _first_evidence}, (Target("seconds", 0.25),)
    ),
}
