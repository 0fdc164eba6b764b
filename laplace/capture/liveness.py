"""Which modules, of those that a fit does not differentiate, have no influence on the outputs of a batch.

Frozen parameters and those before a last layer are not differentiated by a fit. What they feed may couple examples all the
same, and shows in nothing while it is dead; so a few examples are asked for gradients of all modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.calls import is_batched, whole_base
from laplace.capture.stateless import with_tensors
from laplace.data.batches import length_of, part_of
from laplace.noise import fixed_directions

_CHUNK = 8  # examples whose graph is held at once, after the first one, which shows all that there is in most models
# Frozen parts may have no backward pass, and may ask their parameters for what plain tensors do not have.
_FAILURES = (RuntimeError, TypeError, AttributeError)


def live_rows(model: nn.Module, x: Any) -> dict[str, int | None]:
    """The first example of a batch in which a module has a gradient.

    Args:
        model: The network in evaluation mode.
        x: Inputs that can be cut into examples.

    Returns:
        For every module with parameters in the graph of the output, and every parameter that no module multiplies by itself,
        the number of that example; None where all gradients are zero. Nothing of models without a backward pass, or where
        there is no memory for one.
    """
    found: dict[str, int | None] = {}
    n = length_of(x)
    for start, stop in [(0, 1), *((i, min(i + _CHUNK, n)) for i in range(1, n, _CHUNK))]:
        try:
            rows = _live_rows(model, part_of(x, slice(start, stop)))
        except torch.OutOfMemoryError:  # the graph of a few examples may be too large where their outputs are not
            break
        for name, row in rows.items():
            if found.get(name) is None:
                found[name] = None if row is None else start + row
        if None not in found.values():
            break
    return found


def _live_rows(model: nn.Module, x: Any) -> dict[str, int | None]:
    known = {name: p for name, p in model.named_parameters() if p.is_floating_point() and not p.is_inference()}
    try:
        tracked = {name: p.detach().requires_grad_() for name, p in known.items()}  # frozen ones too
        with torch.enable_grad(), _edges(model, {name.rpartition(".")[0] for name in known}) as edges:
            f = with_tensors(model, tracked, x)
        if not f.requires_grad:
            return {}
        seen = {name for name, _ in edges}
        edges += [(name, p) for name, p in tracked.items() if name.rpartition(".")[0] not in seen]
        gradients = torch.autograd.grad(f, [edge for _, edge in edges], fixed_directions(f), allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES:  # then there is nothing to see
        return {}
    found: dict[str, int | None] = {}
    for (name, _), gradient in zip(edges, gradients, strict=True):
        if gradient is not None and found.get(name) is None:
            found[name] = _first_row(gradient, len(f))
    return found


@contextmanager
def _edges(model: nn.Module, names: Iterable[str]) -> Iterator[list[tuple[str, Any]]]:
    """Where in the graph the gradients of what modules without children give are, by name, in the order of the calls."""
    found: list[tuple[str, Any]] = []

    def remember(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and not is_batched(output):
            base = whole_base(output)
            found.append((name, torch.autograd.graph.get_gradient_edge(output if base is None else base)))

    modules = {name: model.get_submodule(name) for name in names}
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: remember(name, output))
        for name, module in modules.items()
        if next(module.children(), None) is None
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first_row(gradient: Tensor, n: int) -> int | None:
    """The first example with a gradient, or 0 where rows are no examples; None if there is none."""
    if not bool(gradient.any()):
        return None
    return int(gradient.flatten(1).any(1).nonzero()[0]) if gradient.ndim > 1 and len(gradient) == n else 0
