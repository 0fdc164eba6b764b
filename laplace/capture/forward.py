"""A model's forward pass: one that fails says in which module, and one that ends gives one tensor of outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.admission import named

# Of a forward pass that gets other inputs than it was written for, such as a mapping in place of a tensor.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


def tensor_output(output: Any) -> Tensor:
    """A model's output, if it is one tensor with a batch dimension and one of outputs.

    Raises:
        TypeError: If it is a tuple, a dictionary or another object.
        ValueError: If it has one value per example and no dimension of outputs, or is complex.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The model's output is a {type(output).__name__}, but has to be a tensor (batch, outputs). Wrap the model in a "
            "module whose forward returns the logits or predictions alone, as output.logits, output['logits'] or output[0]."
        )
    if output.ndim < 2:
        raise ValueError(
            f"The model's output has shape {tuple(output.shape)}, but has to be (batch, outputs): end its forward with "
            ".unsqueeze(-1), and give regression targets of shape (batch, 1); binary labels of a Bernoulli may stay (batch,)."
        )
    if output.is_complex():
        raise ValueError(
            f"The model's output is of {output.dtype}, and likelihoods are of real numbers: end its forward with "
            "torch.view_as_real(…).flatten(1), and give targets in the same way."
        )
    return output


def run(model: nn.Module, x: Any, of: str = "the first batch", advice: str = "") -> Any:
    """A forward pass.

    Args:
        model: The network.
        x: One batch of inputs.
        of: What that is, for messages.
        advice: What to do about it, for messages.

    Raises:
        ValueError: If it fails; names the module.
    """
    running: list[str] = []
    try:
        return model(x)
    except torch.OutOfMemoryError:  # which callers know by its class
        raise
    except _FAILURES as error:
        failed = error
    with _entered(model, running):
        try:
            return model(x)
        except _FAILURES:
            where = named(running[-1], model) if running else named("", model)
    what = "" if isinstance(failed, (RuntimeError, ValueError)) else f"{type(failed).__name__}: "
    raise ValueError(f"The model's forward pass of {of} fails in {where}: {what}{failed}{advice}") from failed


@contextmanager
def failures_named(model: nn.Module, x: Any, of: str) -> Iterator[None]:
    """Where what is done with a batch inside the block fails, and so does the forward pass by itself, say in which module.

    Raises:
        ValueError: As :func:`run`.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FAILURES:
        with torch.no_grad():
            run(model, x, of)
        raise


@contextmanager
def _entered(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the modules that are running at the moment in a list, the innermost last."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda m, args, output: running.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
