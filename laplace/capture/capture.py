r"""Capture once, contract many: one forward pass that remembers what every contraction needs.

A capture holds, for every covered layer, the inputs :math:`a` of each of its calls, and gives the output gradients
:math:`g = (\partial f / \partial z)^\top v` for any direction :math:`v` in output space by one backward pass that stops at
the layers' outputs: no gradient of any weight is formed. Parameters without a covered layer get rows of their own, from
the same backward pass where the graph says what is done with them (:mod:`laplace.capture.uses`), else from another one; see
:mod:`laplace.capture.pullback`.

The directions are taken one at a time rather than stacked under ``vmap``: on CPUs the batched convolution backward is an
order of magnitude slower, for linear layers the two are equal, and memory stays at one direction. Variances of a single example
are taken otherwise, see :mod:`laplace.capture.every_output`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture import memory_format
from laplace.capture.attribution import check_attribution, picks_by_mask, picks_rows
from laplace.capture.blocks import row_key
from laplace.capture.calls import Call, by_layer, join_positions, recorded, side_by_side, that_reach
from laplace.capture.evaluation import eval_mode
from laplace.capture.padding import kept_tokens
from laplace.capture.products import calls_of, product
from laplace.capture.pullback import pullback
from laplace.capture.rules import gradients_by_position, inputs_by_position, widths
from laplace.capture.uses import Proven, Uses, numbers_of_uses
from laplace.data.batches import is_divisible, repeated
from laplace.linalg.matmul import faster_products
from laplace.linalg.memory import at_once, ranges
from laplace.linalg.precision import spacing_of_products, without_autocast

_KEPT = 1 << 22  # elements of a layer's inputs up to which they are kept from one direction to the next


class Capture:
    """Outputs, layer inputs and output gradients of one batch.

    Attributes:
        f: Outputs ``(batch, …, outputs)`` without graph.
        modules: The covered layers by name.
        misused: Names of parameters that this batch uses otherwise too than in the calls of their layers or in products.
        kept_tokens: Which positions of the inputs are no padding, ``(batch, time)``; None where all are, or are not known.
        watch: Is shown what :meth:`gradients` gives along every direction; None for nobody.
    """

    watch: Callable[[dict[str, Tensor]], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        x: Tensor | MutableMapping[str, Any],
        layers: Iterable[str],
        others: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
        proven: Proven | None = None,
    ):
        """Run the model on one batch.

        Args:
            model: The network, already in the mode in which it is to be evaluated.
            x: One batch of inputs.
            layers: Names of the covered modules.
            others: Names of the parameters that need Jacobians of their own.
            dtype: Type in which inputs and gradients are handed out.
            proven: See :class:`laplace.capture.uses.Uses`.
        """
        self.dtype, self._model, self._parameters = dtype, model, list(model.parameters())
        layers, others = list(layers), list(others)
        self._products = {name: found for name in layers if (found := product(model, name)) is not None}
        self.modules = {name: self._products.get(name) or model.get_submodule(name) for name in layers}
        self._x, self._how = x, (layers, others, dtype, proven)
        self._forward(model, x)
        self.f = self._output.detach()
        self.kept_tokens = kept_tokens(x)
        known = dict(model.named_parameters(remove_duplicate=False))
        others = {name: known[name] for name in others}
        self._uses = Uses(self._output, others, dtype, proven)
        self._rows = pullback(model, x, [name for name in others if name not in self._uses.by_name])
        self._inputs: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}

    def _forward(self, model: nn.Module, x: Any) -> None:
        hooked = {name: module for name, module in self.modules.items() if name not in self._products}

        def once(x: Any) -> tuple[list[Call], set[str], set[str], Tensor]:
            with recorded(hooked) as (calls, without, others), torch.enable_grad(), faster_products(self._parameters):
                return calls, without, others, model(x)

        calls, without, others, self._output = memory_format.run(once, model, x, hooked.values())
        names = [call.layer for call in calls]
        own = {
            f"{layer}.{key}" if layer else key: parameter
            for layer, module in hooked.items()
            for key, parameter in module.named_parameters(recurse=False)
        }
        numbers = numbers_of_uses(self._output, own)
        runs = Counter(names)
        self.misused = {
            name
            for name, number in numbers.items()
            if name not in self._products and number > runs[name.rpartition(".")[0]]
        } | others
        products, turned, misused = calls_of(self._output, self._products, len(self._output))
        self.misused |= misused
        self.modules.update(turned)
        self._calls = [*(that_reach(self._output, calls) if len(set(names)) < len(names) else calls), *products]
        self._calls_of: dict[str, list[Call]] = {}
        for call in self._calls:
            self._calls_of.setdefault(call.layer, []).append(call)
        self._without_gradient = without | set(names)

    @property
    def called(self) -> Collection[str]:
        """Names of the layers that run in this batch."""
        return self._calls_of.keys()

    def of_copies(self, count: int) -> Capture | None:
        """The capture of the batch in which every example stands so many times; None of inputs without examples."""
        if not is_divisible(self._x):
            return None
        with eval_mode(self._model):
            return Capture(self._model, repeated(self._x, count), *self._how)

    def check_called(self) -> None:
        """Refuse layers that ran without a gradient, and inputs that changed after their layer had run; names the layer."""
        for call in self._calls:
            call.check_unchanged()
        dead = [name for name in self.modules if name in self._without_gradient and name not in self.called]
        if dead:
            raise _dead(dead[0])

    def inputs(self, layer: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Inputs of a layer over all its calls, ``(batch, positions, in)``; of a range of examples.

        They are kept for the next direction, unless those of the batch are many: patches of convolutions are then made anew.
        """
        stop = len(self.f) if stop is None else stop
        few = layer in self._inputs or self._input_size(layer) * len(self.f) <= self._kept
        if few and layer not in self._inputs:
            self._inputs[layer] = self._make_inputs(layer, 0, len(self.f))
        kept = self._inputs.get(layer)
        return self._make_inputs(layer, start, stop) if kept is None else kept[start:stop]

    def input_chunks(self, layer: str, elements: int) -> Iterator[Tensor]:
        """Inputs of a layer as :meth:`inputs`, in chunks of examples of about so many elements."""
        for start, stop in ranges(len(self.f), self._input_size(layer), elements):
            yield self._make_inputs(layer, start, stop)

    def single_input(self, layer: str) -> Tensor | None:
        """What went into a layer, ``(batch, …)`` as it was; None where it has several calls or parts of examples."""
        calls = self._calls_of.get(layer, [])
        if len(calls) != 1 or len(calls[0].value) != len(self.f):
            return None
        return calls[0].by_example(len(self.f))[:, 0].to(self.dtype)

    def _input_size(self, layer: str) -> int:
        """Elements of a layer's inputs for one example."""
        if layer not in self._sizes:
            first = self._make_inputs(layer, 0, 1)
            self._sizes[layer] = first.numel()
            if len(self.f) == 1 and first.numel() <= self._kept:
                self._inputs[layer] = first
        return self._sizes[layer]

    @property
    def _kept(self) -> int:
        return at_once(_KEPT, self.f.device)

    def _make_inputs(self, layer: str, start: int, stop: int) -> Tensor:
        if layer not in self.called:  # in this batch
            return self._blank(layer)[0][start:stop]
        parts = []
        for call in self._calls_of[layer]:
            value = call.by_example(len(self.f))[start:stop]
            a = inputs_by_position(self.modules[layer], value.flatten(0, 1)).to(self.dtype)
            parts.append(join_positions(a, len(value)))
        return side_by_side(parts, stop - start)

    def gradients(self, v: Tensor) -> dict[str, Tensor]:
        """Output gradients of every layer for one direction, and the rows of parameters without a layer.

        Args:
            v: Direction in output space, shaped like :attr:`f`.

        Returns:
            ``(batch, positions, out)`` by layer, ``(batch, size)`` by :func:`row_key`.
        """
        found, at_uses = self._pulled(v, self._uses.edges)
        with eval_mode(self._model):
            rows = {**self._rows(v), **self._uses.rows(at_uses)}
        rows = {row_key(name): row.reshape(len(row), -1).to(self.dtype) for name, row in rows.items()}
        result = {**self._by_layer(found), **rows}
        if self.watch is not None:
            self.watch(result)
        return result

    def layer_gradients(self, v: Tensor) -> dict[str, Tensor]:
        """Those of the layers alone."""
        return self._by_layer(self.output_gradients(v))

    def _by_layer(self, found: list[tuple[Call, Tensor]]) -> dict[str, Tensor]:
        own = by_layer(found)
        return {
            layer: self.positions_of(layer, own[layer]) if layer in own else self._blank(layer)[1]
            for layer in self.modules
        }

    def _blank(self, layer: str) -> list[Tensor]:
        """Inputs and output gradients of a layer that does not run in this batch."""
        n = len(self.f)
        return [torch.zeros(n, 1, w, dtype=self.dtype, device=self.f.device) for w in widths(self.modules[layer])]

    def positions_of(self, layer: str, gradients: Iterable[Tensor]) -> Tensor:
        """One layer's output gradients over all its calls, ``(batch, positions, out)``, from those of every call."""
        parts = []
        for g in gradients:
            g = gradients_by_position(self.modules[layer], g).to(self.dtype)
            parts.append(join_positions(g, len(self.f)))
        return side_by_side(parts, len(self.f))

    def output_gradients(self, v: Tensor) -> list[tuple[Call, Tensor]]:
        """The calls of all layers and the gradients of what came out, in its shape."""
        return self._pulled(v, [])[0]

    def _pulled(self, v: Tensor, further: list[Any]) -> tuple[list[tuple[Call, Tensor]], Sequence[Tensor | None]]:
        """Those, and the gradients at further edges, by one backward pass."""
        edges = [*(call.edge for call in self._calls), *further]
        if not edges:
            return [], ()
        faster = faster_products(self._parameters)
        with eval_mode(self._model), without_autocast(), faster:  # checkpoints run the model again
            grads = torch.autograd.grad(
                self._output, edges, v.to(self._output.dtype), retain_graph=True, allow_unused=True
            )
        found = list(zip(self._calls, grads, strict=False))
        for call, g in found:
            if g is None:
                raise _dead(call.layer)
        return [(call, call.whole(g)) for call, g in found], grads[len(found) :]

    @property
    def width(self) -> int:
        """Elements that come out of the layers for one example, over all calls."""
        return sum(call.shape.numel() for call in self._calls) // len(self.f)

    def check_uses(self, parameters: Iterable[str]) -> None:
        """Refuse a batch that uses a parameter otherwise than its layer, or its products, say.

        Args:
            parameters: Names of those whose rows follow from layers or products.

        Raises:
            ValueError: If there is one; names it.
        """
        wrong = sorted(self.misused.intersection(parameters))
        if wrong:
            raise ValueError(
                f"In this batch, the model uses {wrong} otherwise than in its first one: outside of the calls of their "
                "modules, or in no product with rows of examples. Set requires_grad=False on these, or let the model's forward "
                "do the same with every batch."
            )

    def check_attribution(self) -> None:
        """See :func:`laplace.capture.attribution.check_attribution`; nothing where all rows are those of examples in order."""
        if len(self.f) > 1 and self._calls and (self.folded or picks_rows(self._output)):
            check_attribution(self)

    @property
    def folded(self) -> set[str]:
        """Names of the layers that are given another number of rows than there are examples."""
        return {call.layer for call in self._calls if len(call.value) != len(self.f)}

    @property
    def picks_by_mask(self) -> bool:
        """Whether the number of rows of something depends on values."""
        return picks_by_mask(self._output)

    def first_value(self, layer: str) -> Tensor:
        """What went into a layer's first call, as it is."""
        return self._calls_of[layer][0].value

    @property
    def coarsest(self) -> float:
        """Spacing of the coarsest numbers that a layer was given or gave: those of autocast, or of TF32."""
        types = {kind for call in self._calls for kind in (call.value.dtype, call.dtype) if kind.is_floating_point}
        spacings = (torch.finfo(kind).eps for kind in {*types, self._output.dtype})
        return max(spacing_of_products(self.f.device), *spacings)


def _dead(layer: str) -> ValueError:
    return ValueError(
        f"The output of layer {layer!r} does not influence the model's output, or the layer runs without gradients "
        "(torch.no_grad, torch.inference_mode, detach, a re-entrant checkpoint in the model's forward), so autograd gives "
        "it no curvature. Let its gradient through, or set requires_grad=False on its parameters to leave them out."
    )
