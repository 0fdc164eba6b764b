"""Diagonals of the exact GGN, against laplace-torch's backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from harness import Prepare, Row, Target
from operations import diag_gflop
from problems import cnn, epoch, mlp, problem
from torch import nn

Sizes = tuple[Callable[[], nn.Module], int, int]


def _fit(size: Sizes, **options: Any) -> Callable[[], object]:
    from laplace import Laplace

    model, loader = problem(*size)
    la = Laplace(model, "classification", "all", "diag", **options)
    return lambda: la.fit(loader)


def _ours(size: Sizes) -> Mapping[str, Prepare]:
    from laplace.curvature import backend_class

    cls, kwargs = backend_class("native", "ggn")
    return {
        "ours": partial(_fit, size, backend=cls, backend_kwargs=kwargs),
        "epoch": lambda: epoch(*problem(*size)),
    }


def _peers(size: Sizes) -> Mapping[str, Prepare]:
    from laplace.curvature import AsdlGGN, BackPackGGN

    found = {"backpack": BackPackGGN, "asdl": AsdlGGN}
    return {name: partial(_fit, size, backend=backend) for name, backend in found.items()}


def _gflop(size: Sizes) -> float:
    model, loader = problem(*size)
    return sum(diag_gflop(model, x, model[-1].out_features - 1) for x, _ in loader)


def _row(name: str, *size: Any) -> Row:
    return Row(name, partial(_ours, size), (Target("peer", 3),), partial(_peers, size), partial(_gflop, size))


ROWS = {
    "mlp": _row("Diag exact, MLP (512 / 64)", mlp, 512, 64),
    "cnn": _row("Diag exact, CNN (256 / 32)", cnn, 256, 32),
}
