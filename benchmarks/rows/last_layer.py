"""Last layers, whose curvature has a closed form: dense, and with a thousand classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from harness import Prepare, Row, Target
from problems import epoch, forward, many_classes, mlp, problem
from torch import nn


def _fit(make: Callable[[], nn.Module], examples: int, batch_size: int, structure: str) -> Callable[[], object]:
    from laplace import Laplace

    model, loader = problem(make, examples, batch_size)
    la = Laplace(model, "classification", "last_layer", structure)
    return lambda: la.fit(loader)


def _dense() -> Mapping[str, Prepare]:
    return {"ours": partial(_fit, mlp, 4096, 256, "full"), "epoch": lambda: epoch(*problem(mlp, 4096, 256))}


def _many(structure: str) -> Mapping[str, Prepare]:
    return {
        "ours": partial(_fit, many_classes, 256, 256, structure),
        "forward pass": lambda: forward(*problem(many_classes, 256, 256)),
    }


def _predictive() -> Callable[[], object]:
    from laplace import Laplace

    model, loader = problem(many_classes, 256, 256)
    la = Laplace(model, "classification", "last_layer", "kron")
    la.fit(loader)
    x = next(iter(loader))[0][:32]
    la(x)
    return lambda: la(x)


ROWS = {
    "full": Row("Full, last layer, MLP (P = 10,250; 4,096)", _dense, (Target("epoch", 15),)),
    "kron-1000": Row("Kron, last layer, 1,000 classes (256)", partial(_many, "kron"), (Target("forward pass", 1.2),)),
    "diag-1000": Row("Diag, last layer, 1,000 classes (256)", partial(_many, "diag"), (Target("forward pass", 1.2),)),
    "predictive-1000": Row(
        "GLM predictive, last layer, 1,000 classes (32)", lambda: {"ours": _predictive}, (Target("seconds", 0.05),)
    ),
}
