"""Kronecker factors: exact GGN and one Monte-Carlo sample, against laplace-torch's backends and kronfluence's covariances."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from harness import Prepare, Row, Target
from operations import kron_gflop
from problems import cnn, epoch, mlp, problem
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

Sizes = tuple[Callable[[], nn.Module], int, int]


def _fit(size: Sizes, **options: Any) -> Callable[[], object]:
    from laplace import Laplace

    model, loader = problem(*size)
    la = Laplace(model, "classification", "all", "kron", **options)
    return lambda: la.fit(loader)


def _ours(size: Sizes, estimator: str) -> Mapping[str, Prepare]:
    from laplace.curvature import backend_class

    cls, kwargs = backend_class("native", estimator)
    return {
        "ours": partial(_fit, size, backend=cls, backend_kwargs=kwargs),
        "epoch": lambda: epoch(*problem(*size)),
    }


def _exact_peers(size: Sizes) -> Mapping[str, Prepare]:
    from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

    found = {"curvlinops": CurvlinopsGGN, "asdl": AsdlGGN, "backpack": BackPackGGN}
    return {name: partial(_fit, size, backend=backend) for name, backend in found.items()}


def _mc_peers(size: Sizes) -> Mapping[str, Prepare]:
    from laplace.curvature import CurvlinopsGGN

    return {
        "curvlinops": partial(_fit, size, backend=CurvlinopsGGN, backend_kwargs={"stochastic": True}),
        "kronfluence": partial(_covariances, size),
    }


def _covariances(size: Sizes) -> Callable[[], object]:
    model, loader = problem(*size)
    return covariances(model, loader.dataset, size[2])


def covariances(model: nn.Module, data: Dataset, batch_size: int, cpu: bool = True) -> Callable[[], object]:
    """Return what has kronfluence fit its covariance matrices, which are the Kronecker factors of a sampled Fisher."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            x, y = batch
            logits = model(x)
            if sample:
                y = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return F.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    folder = tempfile.mkdtemp()
    analyzer = Analyzer("bench", prepare_model(model, task), task, cpu=cpu, output_dir=folder, disable_tqdm=True)
    return lambda: analyzer.fit_covariance_matrices(
        "factors",
        data,
        per_device_batch_size=batch_size,
        factor_args=FactorArguments(covariance_max_examples=None),
        overwrite_output_dir=True,
    )


def _gflop(size: Sizes, columns: int) -> float:
    model, loader = problem(*size)
    return sum(kron_gflop(model, x, columns) for x, _ in loader)


def _row(
    name: str, size: Sizes, estimator: str, peers: Callable[[Sizes], Mapping[str, Prepare]], *targets: Target
) -> Row:
    columns = 9 if estimator == "ggn" else 1  # softmax over ten classes has a root of rank nine
    return Row(name, partial(_ours, size, estimator), targets, partial(peers, size), partial(_gflop, size, columns))


_MLP, _CNN = (mlp, 4096, 256), (cnn, 1024, 128)
ROWS = {
    "exact-mlp": _row(
        "Kron exact, MLP (4,096 / 256)", _MLP, "ggn", _exact_peers, Target("peer", 2.8), Target("rate", 0.8)
    ),
    "exact-cnn": _row(
        "Kron exact, CNN (1,024 / 128)", _CNN, "ggn", _exact_peers, Target("peer", 2.5), Target("epoch", 4)
    ),
    "mc-mlp": _row("Kron MC, MLP (4,096 / 256)", _MLP, "mc", _mc_peers, Target("peer", 1.7), Target("epoch", 1.5)),
    "mc-cnn": _row("Kron MC, CNN (1,024 / 128)", _CNN, "mc", _mc_peers, Target("peer", 1.7), Target("epoch", 1.8)),
}
