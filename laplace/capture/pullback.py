r"""Rows :math:`J_n^\top v_n` of parameters that no rule covers, by one backward pass for each direction :math:`v`.

Every example is given copies of these parameters, through one ``vmap`` of the forward pass: the gradients of the copies are the
rows. What ``vmap`` cannot run, or gets wrong, goes one example at a time by ordinary autograd, through graphs that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.capture.agreement import add_up
from laplace.capture.caches import kept_attributes
from laplace.capture.fallback import dense, has_own_weight_lists, input_tensors, rebuild_inputs, refusal
from laplace.capture.stateless import with_tensors
from laplace.data.batches import length_of, part_of
from laplace.linalg.precision import coarsest, without_autocast
from laplace.noise import fixed_directions

Pullback = Callable[[Tensor], dict[str, Tensor]]


def pullback(model: nn.Module, x: Any, names: Sequence[str]) -> Pullback:
    """A function from a direction, shaped like the outputs, to the rows ``(batch, size)`` of the named parameters.

    Args:
        model: The network, already in the mode in which it is to be evaluated.
        x: One batch of inputs.
        names: Names of the parameters, which have ``requires_grad``.

    Raises:
        ValueError: If neither ``vmap`` nor plain autograd can; names the parameters and their modules.
    """
    if not names:
        return lambda v: {}
    refused: Exception | None = None
    if not has_own_weight_lists(model):
        try:
            found = _of_copies(model, x, names)
            agrees = _agrees(model, x, found)
        except Exception as error:  # noqa: BLE001 - vmap refuses in many ways what plain autograd can do
            refused = error
        else:
            if agrees:
                return found
    try:
        return _of_single_examples(model, x, names)
    except RuntimeError as error:
        error.__cause__ = error.__cause__ or refused
        raise refusal(model, names, error) from error


def _of_copies(model: nn.Module, x: Any, names: Sequence[str]) -> Pullback:
    known, n = dict(model.named_parameters(remove_duplicate=False)), length_of(x)
    copies = {name: known[name].detach().expand(n, *known[name].shape).requires_grad_() for name in names}

    def output(parameters: dict[str, Tensor], example: Any) -> Tensor:
        batch = rebuild_inputs(x, example, lambda t: t.unsqueeze(0))
        return with_tensors(model, parameters, batch)[0]

    with torch.enable_grad(), kept_attributes(model):
        f = torch.func.vmap(output)(copies, input_tensors(x))
    return lambda v: dict(zip(names, _rows(f, list(copies.values()), v), strict=True))


def _of_single_examples(model: nn.Module, x: Any, names: Sequence[str]) -> Pullback:
    known = dict(model.named_parameters(remove_duplicate=False))
    params = [known[name] for name in names]
    with torch.enable_grad():
        outputs = [model(part_of(x, slice(i, i + 1)))[0] for i in range(length_of(x))]

    def pull(v: Tensor) -> dict[str, Tensor]:
        try:
            rows = [_rows(f, params, direction) for f, direction in zip(outputs, v, strict=True)]
        except RuntimeError as error:
            raise refusal(model, names, error) from error
        return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    return pull


@without_autocast()
def _rows(f: Tensor, params: list[Tensor], v: Tensor) -> list[Tensor]:
    if not f.requires_grad:
        return [torch.zeros_like(p) for p in params]
    grads = torch.autograd.grad(f, params, v.to(f.dtype), retain_graph=True, allow_unused=True)
    return [dense(g, p) for g, p in zip(grads, params, strict=True)]


def _agrees(model: nn.Module, x: Any, pull: Pullback) -> bool:
    """Whether the rows along one direction sum to the gradient of plain autograd; those of ``prelu`` under ``vmap`` do not."""
    with torch.enable_grad():
        f = model(x)
    if not f.requires_grad:
        return False
    v = fixed_directions(f)
    found, known = pull(v), dict(model.named_parameters(remove_duplicate=False))
    truth = _rows(f, [known[name] for name in found], v)
    for rows, expected in zip(found.values(), truth, strict=True):
        if not add_up(rows.reshape(len(rows), -1), expected.flatten(), coarsest(f, expected)):
            return False
    return True
