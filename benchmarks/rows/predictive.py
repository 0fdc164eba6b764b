"""GLM predictives with Kron over all weights, against laplace-torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from harness import Prepare, Row, Target
from problems import cnn, mlp, problem
from torch import nn

EXAMPLES = 32


def _predict(make: Callable[[], nn.Module], **options: Any) -> Callable[[], object]:
    from laplace import Laplace

    model, loader = problem(make, 128, 64)
    la = Laplace(model, "classification", "all", "kron", **options)
    la.fit(loader)
    x = next(iter(loader))[0][:EXAMPLES]
    la(x)  # decomposes
    return lambda: la(x)


def _peers(make: Callable[[], nn.Module]) -> Mapping[str, Prepare]:
    from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

    found = {"curvlinops": CurvlinopsGGN, "asdl": AsdlGGN, "backpack": BackPackGGN}
    return {name: partial(_predict, make, backend=backend) for name, backend in found.items()}


ROWS = {
    "mlp": Row(
        f"GLM predictive, Kron all weights, MLP ({EXAMPLES})",
        lambda: {"ours": partial(_predict, mlp)},
        (Target("peer", 1000),),
        partial(_peers, mlp),
    ),
    "cnn": Row(
        f"GLM predictive, Kron all weights, CNN ({EXAMPLES})",
        lambda: {"ours": partial(_predict, cnn)},
        (Target("peer", 20),),
        partial(_peers, cnn),
    ),
}
