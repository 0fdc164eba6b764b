"""What a fit would make of a model, found out from one batch of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from laplace import Laplace
from laplace.capture.evaluation import eval_mode
from laplace.data.calling import adapted
from laplace.linalg.precision import products_in
from laplace_dist.data.device import to_device


@dataclass(frozen=True)
class ModelReport:
    """What a fit would make of a model; prints as lines.

    Attributes:
        outputs: Shape of the outputs of the batch; None where the model does not run.
        coverage: `(parameter, structure, reason)` of every tensor with Kronecker factors asked for.
        refused: Why the model would be refused, a sentence; None where it would not. Among the reasons are outputs that
            depend on the other examples of the batch, and outputs that differ from run to run.
        precision: Relative difference of the outputs, in the Frobenius norm, by `--precision` flag.
    """

    outputs: tuple[int, ...] | None
    coverage: list[tuple[str, str, str]] = field(default_factory=list)
    refused: str | None = None
    precision: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line per tensor, then what is refused or how much a flag changes."""
        lines = [f"outputs {self.outputs}"] if self.outputs is not None else []
        width = max((len(name) for name, _, _ in self.coverage), default=0)
        lines += [f"{name:<{width}}  {kind:<4}  {reason}" for name, kind, reason in self.coverage]
        lines += [f"--precision {flag} changes the outputs by {change:.1e}" for flag, change in self.precision.items()]
        return "\n".join([*lines, *([f"refused: {self.refused}"] if self.refused else [])])


def check_model(
    model: nn.Module, inputs: Any, likelihood: Any = "classification", subset_of_weights: str = "all"
) -> ModelReport:
    """Say which parameters a fit covers how, what it would refuse, and how much the precision flags change the outputs.

    Args:
        model: The network; its weights and mode are left as they are.
        inputs: Of a few examples, at least two, as the model takes them: a tensor, or a mapping or tuple of tensors.
        likelihood: As of `laplace.Laplace`.
        subset_of_weights: `all` or `last_layer`.

    Raises:
        ValueError: If the likelihood or the subset is unknown.
    """
    model = adapted(model, "labels")
    x = to_device(inputs, next(model.parameters()).device)
    la = Laplace(model, likelihood, subset_of_weights, "kron")
    try:
        with torch.no_grad(), eval_mode(model):
            f = model(x)
    except Exception as error:  # the user's own code
        return ModelReport(None, refused=f"its forward fails on these inputs ({type(error).__name__}: {error})")
    if not isinstance(f, torch.Tensor):
        return ModelReport(None, refused=f"it returns a {type(f).__name__} without logits; expected one tensor")
    try:
        la.initialize(x)
    except (ValueError, RuntimeError, TypeError) as error:
        return ModelReport(tuple(f.shape), refused=str(error))
    return ModelReport(tuple(f.shape), list(la.coverage), None, _changes(model, x, f))


@torch.no_grad()
def _changes(model: nn.Module, x: Any, f: torch.Tensor) -> dict[str, float]:
    """Return how much the flags change the outputs; TF32 is a matter of GPUs."""
    found = {}
    with eval_mode(model):
        if f.is_cuda:
            with products_in("tf32"):
                found["tf32"] = _relative(model(x), f)
        with torch.autocast(f.device.type, torch.bfloat16, cache_enabled=False):
            found["bf16"] = _relative(model(x), f)
    return found


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-300))
