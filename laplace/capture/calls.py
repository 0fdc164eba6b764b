"""The calls of covered layers in one forward pass: what went in, and where in the graph the gradient of what came out is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        layer: Name of the module.
        value: What went in, without graph.
        version: How often ``value`` had been changed in place by then.
        edge: Where the gradient of the output is; the edge, not the tensor, since a later in-place operation may change
            what the tensor stands for.
        shape: Shape of the output.
        dtype: Type of the output, which autocast makes another than that of the input.
        positions: Where rows are positions first and then examples, the number of positions; else 0.
        others: How many rows of the weight come before and after those that this call makes use of.
    """

    layer: str
    value: Tensor
    version: int
    edge: Any
    shape: torch.Size
    dtype: torch.dtype
    positions: int = 0
    others: tuple[int, int] = (0, 0)

    def in_order(self, rows: Tensor) -> Tensor:
        """Rows with the examples first."""
        return rows.unflatten(0, (self.positions, -1)).transpose(0, 1) if self.positions else rows

    def whole(self, g: Tensor) -> Tensor:
        """The gradient of the output in order, with zeros for rows of the weight that the call makes no use of."""
        g = self.in_order(g.reshape(self.shape))
        return F.pad(g, self.others) if any(self.others) else g

    def by_example(self, n: int) -> Tensor:
        """What went in, of ``n`` examples ``(batch, parts, …)``.

        Models may fold positions into the batch, as ``x.flatten(0, 1)`` does; then every example has several parts. Where
        the fold is of another order, the check against automatic differentiation finds out.
        """
        self.check_unchanged()
        value = self.value
        return value.unflatten(0, (n, len(value) // n)) if len(value) % n == 0 else value[None]

    def check_unchanged(self) -> None:
        """Refuse an input that was changed after the layer had seen it.

        Raises:
            ValueError: If it was; names the layer.
        """
        if self.value._version != self.version:
            raise ValueError(
                f"The input of layer {self.layer!r} is changed in place after the layer has run, so that what its weight was "
                "multiplied by is lost. Replace the in-place operation in the model's forward by one that makes a new tensor."
            )


def whole_base(output: Tensor) -> Tensor | None:
    """What an output is a view of in other dimensions: in-place operations on the view leave its edge alone."""
    base = output._base
    whole = base is not None and base.requires_grad and base.numel() == output.numel()
    return base if whole and base.is_contiguous() and output.is_contiguous() else None


def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """What went into a layer: its first argument, by position or by whatever name; None if that is no tensor with examples."""
    value = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
    return value if isinstance(value, Tensor) and value.ndim else None


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[tuple[list[Call], set[str], set[str]]]:
    """Record the calls of modules inside the block.

    Returns:
        The calls whose outputs have a gradient, the names of the modules that ran without one, and of those that were given or
        gave something else than a tensor, as subclasses of torch's layers may.
    """
    calls: list[Call] = []
    without: set[str] = set()
    others: set[str] = set()

    def remember(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            value = input_of(args, kwargs)
            if value is None or not isinstance(output, Tensor):
                others.add(name)
                return None
            if is_batched(output):
                return None
            if not output.requires_grad:
                without.add(name)
                return None
            base, kept = whole_base(output), None
            if base is None and output._is_view():
                output = kept = output.clone()  # a later in-place operation would cut a view's edge off
            edge = torch.autograd.graph.get_gradient_edge(output if base is None else base)
            calls.append(Call(name, value.detach(), value._version, edge, output.shape, output.dtype))
            return kept

        return hook

    handles = [module.register_forward_hook(remember(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls, without, others
    finally:
        for handle in handles:
            handle.remove()


def by_layer(found: Iterable[tuple[Call, Tensor]]) -> dict[str, list[Tensor]]:
    """Gradients of what came out of calls, by their layers."""
    own: dict[str, list[Tensor]] = {}
    for call, g in found:
        own.setdefault(call.layer, []).append(g)
    return own


def join_positions(values: Tensor, n: int) -> Tensor:
    """``(batch · parts, positions, width)`` as ``(batch, parts · positions, width)``."""
    rows = values.shape[0]
    if rows == n or rows % n != 0:
        return values
    return values.reshape(n, -1, values.shape[-1])


def side_by_side(parts: list[Tensor], n: int) -> Tensor:
    """Positions of several calls, one after the other; alone what is no batch of the examples, which is refused later."""
    parts = [part for part in parts if part.shape[0] != n][:1] or parts
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def is_batched(value: Tensor) -> bool:
    """Whether a tensor belongs to a ``vmap`` or another transform of the model's own, outside of which it means nothing."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def that_reach(output: Tensor, calls: Sequence[Call]) -> list[Call]:
    """Calls on which the output depends by its graph; one that is used detached alone is none."""
    seen = set(nodes(output))
    return [call for call in calls if call.edge.node in seen]


def nodes(output: Tensor) -> Iterator[Any]:
    """All nodes of an output's graph."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node
