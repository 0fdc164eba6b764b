"""Models as curvlinops differentiates them: in forward mode, by parameters under one name each, with outputs in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace.capture.stateless import with_tensors


@contextmanager
def in_forward_mode() -> Iterator[None]:
    """Take the kernel of attention that has a derivative in forward mode, and say so of what has none.

    Raises:
        ValueError: If curvlinops' products fail.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        raise ValueError(
            f"curvlinops cannot multiply with the curvature of this model, which it differentiates in forward mode: {what} "
            "Use the native backend."
        ) from error


def by_one_name(model: nn.Module) -> nn.Module:
    """The model, or one with its parameters where a module has several names, by which curvlinops would leave it broken."""
    names = [len(list(model.named_modules(remove_duplicate=each))) for each in (True, False)]
    return model if names[0] == names[1] else _OneName(model)


class _OneName(nn.Module):
    """The function of a model, as a module of its own that has the model's parameters and none of its modules."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model, self._names = (model,), [name for name, _ in model.named_parameters()]
        for number, parameter in enumerate(model.parameters()):
            self.register_parameter(str(number), parameter)

    def forward(self, x: Any) -> Tensor:
        tensors = {name: getattr(self, str(number)) for number, name in enumerate(self._names)}
        return with_tensors(self._model[0], tensors, x)


class DoubleOutputs(nn.Module):
    """A model whose outputs are of float64, and so its loss: in float32, the 1 - p of a sure example has no digits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Tensor:
        """Run it and widen what it gives."""
        return self.model(x).double()
