r"""Parameters by identity: what the graph of a forward pass does with a parameter gives its rows :math:`J_n^\top v_n`.

A parameter that no covered module owns may still be used in operations whose rows follow from what they keep: a product, a sum,
a convolution, a table look-up, in a function of the model's own or inside of another module. Such a *use* is a node of the
graph; between it and the parameter there may be views alone, as a transpose, a part of stacked weights, or the rows of a table
of positions that are looked up for all examples at once. Rows of several uses add up, so tied weights are nothing special. All
uses share the backward pass of the layers.

Nothing is believed: weights of the examples have to come back in what reaches a use, each in the rows of its own example, and
the rows of all examples have to sum to the gradient. That is asked of every batch, unless its graph has the operations and
shapes of one in which it held, and none that orders rows by values. A parameter of which it does not hold, or that has another
kind of use, is left to :mod:`laplace.capture.pullback`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from laplace.capture.agreement import add_up
from laplace.capture.attribution import ORDERING, example_weights
from laplace.capture.calls import nodes
from laplace.capture.fallback import dense
from laplace.capture.use_rules import LAYOUTS, RULES, VIEWS, Layout
from laplace.linalg.precision import coarsest, in_full_precision, without_autocast
from laplace.noise import fixed_directions

_DIMENSIONS = ("_saved_dim", "_saved_dim0", "_saved_dim1", "_saved_dims")  # along which views and others work
_GRAPHS = 64  # that are remembered: batches of sequences have many shapes

Proven = dict[int, tuple[tuple[str, ...], list[Layout]]]
"""By the :func:`signature` of a graph, the parameters whose uses hold in it, and the layouts of its uses in order."""


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
        node: The operation.
        slot: Which of its inputs the parameter, or a view of it, is.
        views: The nodes of views from the parameter to that input, each with the number of its output.
        shape: Shape of the input.
    """

    node: Any
    slot: int
    views: tuple[tuple[Any, int], ...]
    shape: torch.Size

    @property
    def rule(self) -> Callable:
        """From the use, its output's gradient, its layout and the number of examples to rows of the input."""
        return RULES[type(self.node).__name__, self.slot]

    def to_parameter(self, rows: Tensor) -> Tensor:
        """Rows of the input as rows of the parameter."""
        for node, number in reversed(self.views):
            rows = _through(node, number, rows)
        return rows


def _through(node: Any, number: int, rows: Tensor) -> Tensor:
    """Every row through the backward function of a view."""
    before = [None] * number
    after = [None] * (len(node._input_metadata) - number - 1)

    def one(row: Tensor) -> Tensor:
        found = node(*before, row, *after)
        return found[0] if isinstance(found, tuple) else found

    return torch.func.vmap(one)(rows)


class Uses:
    """The uses of some parameters in one graph.

    Attributes:
        by_name: Uses of every parameter whose rows they give; the others are missing.
        edges: Where the gradients are that :meth:`rows` takes.
    """

    def __init__(self, output: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype, proven: Proven | None = None):
        """Find the uses of parameters with ``requires_grad`` in the graph of a batch's output, and check them.

        Args:
            output: ``(batch, …)``.
            params: The parameters by name.
            dtype: Type of the rows.
            proven: Graphs in which these parameters' uses hold, to which this one is added.
        """
        self._n, self._dtype = len(output), dtype
        found = uses_of(output, params) if params else {}
        self.by_name = {name: uses for name, uses in found.items() if uses}
        self._layouts: dict[Any, Layout] = {}
        self._collect()
        if not self.by_name:
            return
        graph = None if proven is None else signature(output)
        if graph is not None and graph in proven:
            names, layouts = proven[graph]
            self.by_name = {name: self.by_name[name] for name in names}
            self._collect()
            self._layouts = dict(zip(self._nodes, layouts, strict=True))
            return
        try:
            alive = self._keep_what_holds(output, params)
        except RuntimeError:  # there is no gradient, of which automatic differentiation then says what it is
            self.by_name, alive = {}, False
        self._collect()
        if graph is not None and alive:
            if len(proven) >= _GRAPHS:
                proven.clear()
            proven[graph] = tuple(self.by_name), [self._layouts[node] for node in self._nodes]

    def _collect(self) -> None:
        self._nodes = list(dict.fromkeys(use.node for uses in self.by_name.values() for use in uses))
        self.edges = [GradientEdge(node, 0) for node in self._nodes]

    def rows(self, gradients: list[Tensor | None]) -> dict[str, Tensor]:
        """Rows ``(batch, size)`` of every parameter, from the gradients at :attr:`edges`."""
        at = dict(zip(self._nodes, gradients, strict=True))
        return {name: self._row(uses, at) for name, uses in self.by_name.items()}

    @in_full_precision()
    def _row(self, uses: list[Use], at: dict[Any, Tensor | None]) -> Tensor:
        parts = []
        for use in uses:
            g = at[use.node]
            if g is None:
                continue
            rows = use.rule(use, g.to(self._dtype), self._layouts[use.node], self._n)
            parts.append(use.to_parameter(rows).reshape(self._n, -1))
        return sum(parts[1:], parts[0])

    def _keep_what_holds(self, output: Tensor, params: Mapping[str, Tensor]) -> bool:
        """Forget the uses of parameters of which rows and gradient differ; whether there was a gradient everywhere."""
        v = fixed_directions(output.detach()).to(output.dtype)
        weights = example_weights(output.detach())
        names = list(self.by_name)
        with without_autocast():
            plain = torch.autograd.grad(output, self.edges, v, retain_graph=True, allow_unused=True)
            weighted = torch.autograd.grad(
                output,
                [*self.edges, *(params[name] for name in names)],
                v * weights.view(-1, *[1] * (v.ndim - 1)),
                retain_graph=True,
                allow_unused=True,
            )
        for node, one, two in zip(self._nodes, plain, weighted, strict=False):
            layout = _layout(one, two, weights)
            if layout is not None:
                self._layouts[node] = layout
        at = dict(zip(self._nodes, weighted, strict=False))
        for name, truth in zip(names, weighted[len(self._nodes) :], strict=True):
            if not self._holds(self.by_name[name], at, dense(truth, params[name])):
                del self.by_name[name]
        return all(g is not None and bool(g.any()) for g in plain)

    def _holds(self, uses: list[Use], at: dict[Any, Tensor | None], truth: Tensor) -> bool:
        known = [use for use in uses if at[use.node] is not None]
        if not known or any(use.node not in self._layouts for use in known):
            return False
        try:
            rows = self._row(uses, at)
        except (RuntimeError, ValueError):  # what a node kept is gone or was changed, or is no batch of examples
            return False
        if rows.shape != (self._n, truth.numel()):
            return False
        return add_up(rows, truth.flatten(), coarsest(rows, truth, *(at[use.node] for use in known)))


def signature(output: Tensor) -> int | None:
    """What tells the graph of an output from others; None where values may order its rows.

    Its operations with their dimensions and shapes, how they are connected, and the tensors that it begins with.
    """
    order = {node: number for number, node in enumerate(nodes(output))}
    found: list[Any] = []
    for node in order:
        name = type(node).__name__
        if any(kind in name for kind in ORDERING) or isinstance(node, torch.autograd.function.BackwardCFunction):
            return None
        shapes = tuple(tuple(given.shape) for given in node._input_metadata)
        dimensions = tuple(getattr(node, saved, None) for saved in _DIMENSIONS)
        sources = tuple((order.get(source), number) for source, number in node.next_functions)
        found.append((name, shapes, dimensions, sources, id(getattr(node, "variable", None))))
    return hash(tuple(found))


def _layout(plain: Tensor | None, weighted: Tensor | None, weights: Tensor) -> Layout | None:
    """The order of rows in which every example has the gradient of its own weight; None if there is none."""
    if plain is None or weighted is None:
        return None
    weights, spacing = weights.to(plain.dtype), torch.finfo(plain.dtype).eps
    for layout in LAYOUTS:
        one, two = layout(plain, len(weights)), layout(weighted, len(weights))
        if one is None:
            continue
        expected = one * weights.view(-1, *[1] * (one.ndim - 1))
        if bool((two - expected).norm() <= min(1e3 * spacing, 0.01) * expected.norm()):  # they are powers of two
            return layout
    return None


def uses_of(output: Tensor, params: Mapping[str, Tensor]) -> dict[str, list[Use] | None]:
    """The uses of every parameter that an output depends on by its graph; None where one of them is of another kind."""
    leaves, consumers = _leaves_and_consumers(output)
    known = {name: leaves[id(p)] for name, p in params.items() if id(p) in leaves}
    n = len(output)
    return {name: _uses(leaf, (), params[name].shape, consumers, n) for name, leaf in known.items()}


def numbers_of_uses(output: Tensor, params: Mapping[str, Tensor]) -> dict[str, int]:
    """How often an output's graph does something with every parameter, of whatever kind."""
    leaves, consumers = _leaves_and_consumers(output)

    def number(node: Any) -> int:
        found = [consumer for consumer, _, _ in consumers.get(node, ())]
        return sum(number(consumer) if type(consumer).__name__ in VIEWS else 1 for consumer in found)

    return {name: number(leaves[id(p)]) for name, p in params.items() if id(p) in leaves}


def _leaves_and_consumers(output: Tensor) -> tuple[dict[int, Any], dict[Any, list[tuple[Any, int, int]]]]:
    """Nodes of parameters by their identity; for every node, those that take what it gives, as which input, which output."""
    leaves: dict[int, Any] = {}
    consumers: dict[Any, list[tuple[Any, int, int]]] = {}
    for node in nodes(output):
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node
        for slot, (source, number) in enumerate(node.next_functions):
            if source is not None:
                consumers.setdefault(source, []).append((node, slot, number))
    return leaves, consumers


def _uses(node: Any, views: tuple, shape: torch.Size, consumers: Mapping[Any, list], n: int) -> list[Use] | None:
    """All uses of what a node gives; None if there is one without a rule."""
    found: list[Use] = []
    for consumer, slot, number in consumers.get(node, ()):
        through = (*views[:-1], (views[-1][0], number)) if views else views
        kind = type(consumer).__name__
        viewed = kind in VIEWS or _is_same_for_all(consumer, slot, n)
        if (kind, slot) in RULES and not viewed:
            given = node._input_metadata[number].shape if views else shape
            found.append(Use(consumer, slot, through, torch.Size(given)))
            continue
        more = _uses(consumer, (*through, (consumer, 0)), shape, consumers, n) if viewed else None
        if more is None:
            return None
        found += more
    return found


def _is_same_for_all(node: Any, slot: int, n: int) -> bool:
    """Whether a node looks up rows of a table that are the same for all examples, as positions are: a part of the table."""
    return type(node).__name__ == "EmbeddingBackward0" and slot == 0 and node._saved_indices.shape[:1] != (n,)
