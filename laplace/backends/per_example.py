"""Dense and diagonal curvature from per-example gradients that another package computes, checked against autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.backends.interface import CurvatureInterface
from laplace.backends.isolated import isolated_copy
from laplace.backends.options import honours
from laplace.capture.agreement import add_up
from laplace.capture.contractions import output_directions
from laplace.capture.evaluation import eval_mode
from laplace.linalg.gram import add_gram_, mirror_
from laplace.linalg.precision import coarsest
from laplace.structures.sums import CurvatureSums

Gradients = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]


class PerExampleInterface(CurvatureInterface):
    r"""Jacobians, gradients, full and diag from rows :math:`J_n^\top v_n`, one output direction :math:`v` at a time.

    A subclass names its package and implements :meth:`_linearised`. It works on a copy of the model (of the last layer and
    its features, for last-layer curvature), so the user's model is never hooked or marked. Packages like these return wrong
    rows for uses of a layer that they do not know (called twice, tied, batch dimension not first). So every sum of rows is
    compared with the gradient of automatic differentiation, and one example with its own.
    """

    package: str

    def _linearised(self, module: nn.Module, x: Any) -> AbstractContextManager[tuple[Tensor, Gradients]]:
        """Run the module; give its outputs and a function from a direction to rows and gradients.

        The function returns, for every parameter with ``requires_grad``, its rows ``(batch, …)`` and its summed gradient
        by automatic differentiation.
        """
        raise NotImplementedError

    def accumulate(self, sums: CurvatureSums, x: Any, y: Tensor, offset: int = 0) -> None:
        """Add one batch to raw sums in place; see :meth:`CurvatureInterface.accumulate`.

        Raises:
            NonFiniteError: If an output or target is NaN or Inf; names the examples. The sums are unchanged.
            ValueError: If the targets do not fit the outputs, or the package cannot treat the model. The sums are unchanged.
        """
        self.spec = sums.spec
        super().accumulate(sums, x, y, offset)

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Dense Jacobians ``(batch, outputs, parameters)`` and outputs; by torch.func where gradients have to pass."""
        if enable_backprop:
            return self.functorch_jacobians(x, enable_backprop)
        self.check_batch(x)
        rows: list[Tensor] = []
        f = self._each_row(x, None, lambda f: output_directions(f), rows.append)
        js = torch.stack(rows, 1)
        return (js if self.subnetwork_indices is None else js[..., self.subnetwork_indices]), f

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Per-example gradients of the negative log likelihood ``(batch, parameters)``, and its sum."""
        rows: list[Tensor] = []
        f = self._each_row(x, y, lambda f: iter([self.likelihood_object.gradient(f, y)]), rows.append)
        gradients = rows[0] if self.subnetwork_indices is None else rows[0][:, self.subnetwork_indices]
        return gradients, self.likelihood_object.loss(f, y)

    @honours("mc_samples")
    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Dense curvature of one batch ``(parameters, parameters)``."""
        size = self._size
        total = torch.zeros(size, size, dtype=torch.float64, device=self.params[0].device)
        loss = self._for_rows(x, y, lambda rows: add_gram_(total, [rows]))
        mirror_(total)
        return loss, total.to(self.sums_dtype)

    @honours("mc_samples")
    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Diagonal curvature of one batch ``(parameters,)``."""
        total = torch.zeros(self._size, dtype=torch.float64, device=self.params[0].device)
        loss = self._for_rows(x, y, lambda rows: total.add_(rows.square().sum(0)))
        return loss, total.to(self.sums_dtype)

    @property
    def _size(self) -> int:
        """Number of parameters with curvature."""
        return sum(p.numel() for p in self.params) if self.subnetwork_indices is None else len(self.subnetwork_indices)

    def _for_rows(self, x: Any, y: Tensor, use: Callable[[Tensor], object]) -> Tensor:
        """Hand the rows ``(batch, parameters with curvature)`` of the estimator's directions to ``use``; return the loss."""
        chosen = slice(None) if self.subnetwork_indices is None else self.subnetwork_indices
        f = self._each_row(x, y, lambda f: self.directions(f, y, self._offset), lambda rows: use(rows[:, chosen]))
        return self.likelihood_object.loss(f, y)

    def _module(self, x: Any) -> tuple[nn.Module, Any]:
        """A copy of what is to be differentiated, and its inputs: the last layer and its features where that is all."""
        if not self.last_layer:
            return isolated_copy(self.model), _without_graph(x)
        with torch.no_grad(), eval_mode(self.model):
            _, features = self.model.forward_with_features(x)
        return isolated_copy(self.model.last_layer), features.detach()

    def _each_row(
        self,
        x: Any,
        y: Tensor | None,
        directions: Callable[[Tensor], Iterator[Tensor]],
        use: Callable[[Tensor], None],
    ) -> Tensor:
        """Hand the rows ``(batch, parameters)`` of every direction to ``use``; return the outputs."""
        module, inputs = self._module(x)
        with self._linearised(module, inputs) as (output, gradients):
            f = output.detach()
            if y is not None:
                self.likelihood_object.check(f, y, self._offset)
            for number, v in enumerate(directions(f.double())):
                rows = self._checked_rows(gradients, v.to(output.dtype))
                if number == 0:
                    self._check_one_example(gradients, v.to(output.dtype), rows)
                use(rows.to(self.sums_dtype))
        return f.to(self.sums_dtype)

    def _checked_rows(self, gradients: Gradients, v: Tensor) -> Tensor:
        rows, sums = gradients(v)
        flat = []
        for name, row, total in zip(self.named_params, rows, sums, strict=True):
            if row.shape[0] != len(v) or row[0].numel() != total.numel():
                raise self._refusal(name)
            row = row.reshape(len(v), -1)
            self._check(name, row, total)
            flat.append(row)
        return torch.cat(flat, 1)

    def _check_one_example(self, gradients: Gradients, v: Tensor, rows: Tensor) -> None:
        alone = torch.zeros_like(v)
        alone[-1] = v[-1]
        _, sums = gradients(alone)
        for name, row, total in zip(self.named_params, rows[-1].split([t.numel() for t in sums]), sums, strict=True):
            self._check(name, row[None], total)

    def _check(self, name: str, rows: Tensor, total: Tensor) -> None:
        if not add_up(rows.double(), total.double().flatten(), coarsest(self.params[0])):
            raise self._refusal(name)

    def _refusal(self, name: str) -> ValueError:
        return ValueError(
            f"{self.package}'s per-example gradients of {name!r} are not its gradients: the layer runs more than once, shares "
            "its weight, is of a kind or in a mode that the package does not know, or does not have the batch dimension first. "
            "Use the native backend."
        )


def _without_graph(x: Any) -> Any:
    """Inputs that do not require gradients: packages ask layers for derivatives in inputs that do, and lack some of them."""
    return x.detach() if isinstance(x, Tensor) else x
