"""Parts of a model of which no batch so far has shown whether examples depend on one another.

What couples the examples of a batch shows in nothing where it is dead: where all examples are equal, as where one is doubled,
where a module gives zeros or did not run, and where a layer has no gradient. The first batch may be like that. So what it
left open is watched, and :func:`laplace.capture.soundness.check_function` asks the first batch that proves something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.calls import is_batched
from laplace.capture.evaluation import eval_mode
from laplace.capture.liveness import live_rows
from laplace.capture.soundness import check_function, differing
from laplace.data.batches import is_divisible, length_of, part_of

_ASKED = 8  # examples that are asked


class Unproven:
    """What is left open, by name.

    Attributes:
        modules: That gave the same for all examples, or did not run.
        layers: That had no gradient; of parameters without a layer, :func:`laplace.capture.blocks.row_key`.
        before: The same of what is not differentiated by the fit, see :mod:`laplace.capture.liveness`; None before any batch.
    """

    def __init__(self, modules: Iterable[str] = (), layers: Iterable[str] = (), before: Iterable[str] | None = ()):
        """See the class."""
        self.modules, self.layers = set(modules), set(layers)
        self.before = None if before is None else set(before)
        self._found: dict[str, int] = {}

    @contextmanager
    def watched(self, model: nn.Module, x: Any) -> Iterator[None]:
        """Ask a batch, in whose forward pass inside the block one of the modules gives examples different values.

        Raises:
            ValueError: If the examples of that batch depend on one another; names the module.
        """
        if not self.modules or not is_divisible(x) or length_of(x) < 2:
            yield
            return
        self._found, n = {}, length_of(x)

        def look(name: str, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            ours = isinstance(value, Tensor) and not value.is_nested and not is_batched(value)
            if ours and value.ndim and len(value) == n:
                row = differing(value.detach())
                if row is not None:
                    self._found.setdefault(name, row)

        handles = [
            module.register_forward_hook(lambda m, args, output, name=name: look(name, output))
            for name, module in model.named_modules()
            if name in self.modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._found:
            _ask(model, x, self._found.values())
            self.modules -= self._found.keys()

    def look_before(self, model: nn.Module, x: Any) -> None:
        """Ask a batch in which something before the parameters that are inferred has a gradient.

        Args:
            model: The network in evaluation mode.
            x: The batch.

        Raises:
            ValueError: If the examples of that batch depend on one another; names the module.
        """
        if self.before == set() or not is_divisible(x) or length_of(x) < 2:
            return
        found = live_rows(model, x)
        open_ = found.keys() if self.before is None else self.before
        rows = {name: row for name, row in found.items() if name in open_ and row is not None}
        if rows:
            _ask(model, x, rows.values())
        self.before = open_ - rows.keys()

    def look_at_gradients(self, model: nn.Module, x: Any, gradients: dict[str, Tensor]) -> None:
        """Ask a batch in which one of the layers has a gradient.

        Args:
            model: The network in evaluation mode.
            x: The batch.
            gradients: What :meth:`laplace.capture.capture.Capture.gradients` gives, ``(batch, …)`` each.

        Raises:
            ValueError: If the examples of that batch depend on one another; names the module.
        """
        if not self.layers or not is_divisible(x) or length_of(x) < 2:
            return
        rows = {}
        for layer in self.layers & gradients.keys():
            alive = gradients[layer].flatten(1).any(1).nonzero()
            if len(alive):
                rows[layer] = int(alive[0])
        if rows:
            with eval_mode(model):
                _ask(model, x, rows.values())
            self.layers -= rows.keys()


def _ask(model: nn.Module, x: Any, rows: Iterable[int]) -> None:
    """Check a few examples of a batch, those of some rows first."""
    chosen = list(dict.fromkeys([*sorted(set(rows))[: _ASKED // 2], *range(length_of(x))]))[:_ASKED]
    strings = not isinstance(x, (Tensor, MutableMapping))
    check_function(model, [x[i] for i in chosen] if strings else part_of(x, torch.tensor(chosen)))
