r"""Weights that no module multiplies by itself: those of attention, recurrent layers, functions, and tied ones.

They are found in the graph of a forward pass: a product :math:`a W^\top` is a node that keeps :math:`a`, the gradient of what
comes out of it is :math:`g`, and so the curvature of :math:`W` follows from the two as that of a linear layer does. Several
products with a weight are like several calls of a layer: their positions stand one after the other. Where a product is with
some rows of a weight, as attention's over a memory, the output gradients of the other rows are zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from laplace.capture.calls import Call
from laplace.capture.uses import Use, uses_of

_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_FIRST_FACTORS = {("AddmmBackward0", 2): "_saved_mat1", ("MmBackward0", 1): "_saved_self"}
_TURNS = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
_PARTS = ("SplitBackward0", "SplitWithSizesBackward0")  # of stacked weights
_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


@dataclass(frozen=True)
class Product:
    """A weight that is multiplied by rows.

    Attributes:
        weight: ``(out, in)``, or transposed.
        batch_second: Whether rows are positions first, then examples, as attention has them inside.
        transposed: Whether the weight is ``(in, out)``.
    """

    weight: Tensor
    batch_second: bool
    transposed: bool = False


def product_of(model: nn.Module, name: str) -> str | None:
    """The name of the weight whose products give the curvature of a parameter: itself, or a bias's weight.

    Returns:
        None if the parameter is not one of a module that multiplies it in a function.
    """
    owner, _, key = name.rpartition(".")
    if owner.rpartition(".")[2] == "out_proj" and isinstance(
        _module(model, owner.rpartition(".")[0]), nn.MultiheadAttention
    ):
        owner, key = owner.rpartition(".")[0], f"out_proj.{key}"
    module, weight = _module(model, owner), key.replace("bias", "weight")
    recurrent = isinstance(module, (nn.RNNBase, *_CELLS))
    known = recurrent or (isinstance(module, nn.MultiheadAttention) and weight in _WEIGHTS)
    full = f"{owner}.{weight}" if owner else weight
    return full if known and _parameter(model, full) is not None else None


def product(model: nn.Module, weight: str) -> Product | None:
    """The products of a weight by its name; None if it is no parameter's name."""
    value = _parameter(model, weight)
    owner, _, key = weight.rpartition(".")
    module, above = _module(model, owner), _module(model, owner.rpartition(".")[0])
    inside = isinstance(above, nn.MultiheadAttention) and owner.rpartition(".")[2] == "out_proj"
    second = inside or isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
    return None if value is None else Product(value, second)


def calls_of(output: Tensor, products: dict[str, Product], n: int) -> tuple[list[Call], dict[str, Product], set[str]]:
    """Every product with one of the weights that an output depends on.

    Args:
        output: The model's output, with its graph.
        products: By name.
        n: Number of examples.

    Returns:
        The products as calls; their weights as they are multiplied, by name; and the names of weights that have other uses.
    """
    calls: list[Call] = []
    found, misused = dict(products), set()
    for name, uses in (
        uses_of(output, {key: value.weight for key, value in products.items()}) if products else {}
    ).items():
        made = [_call(name, use, products[name], n) for use in uses or ()]
        if not made or None in made or len({turned for _, turned in made}) > 1:
            misused.add(name)
            continue
        calls += [call for call, _ in made]
        found[name] = replace(products[name], transposed=not made[0][1])
    return calls, found, misused


def _call(name: str, use: Use, product: Product, n: int) -> tuple[Call, bool] | None:
    """A use as a call, and whether the weight is turned; None if it is no product with rows of the weight or all of it."""
    rows = _multiplied(use)
    part = _rows_of_weight(use, len(product.weight))
    if rows is None or part is None:
        return None
    turned, first, count = part
    positions = len(rows) // n if product.batch_second and len(rows) % n == 0 else 0
    shape = torch.Size((len(rows), use.shape[-1]))
    call = Call(name, rows, rows._version, GradientEdge(use.node, 0), shape, rows.dtype, positions)
    call.value = call.in_order(rows.detach())
    call.others = (first, len(product.weight) - first - count) if turned else (0, 0)
    return call, turned


def _rows_of_weight(use: Use, size: int) -> tuple[bool, int, int] | None:
    """Whether a product is with the transpose of a weight, the first of the rows that it is with, and how many."""
    turned, first, count = False, 0, size
    for node, number in use.views:
        kind = type(node).__name__
        if kind in _TURNS:
            turned = not turned
        elif kind in _PARTS and not turned and node._saved_dim == 0:
            sizes = [part.shape[0] for part in node._input_metadata]
            first, count = first + sum(sizes[:number]), sizes[number]
        elif kind != "ToCopyBackward0":
            return None
    return None if count != size and not turned else (turned, first, count)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    owner, _, key = name.rpartition(".")
    module = _module(model, owner)
    return None if module is None else module._parameters.get(key)


def _multiplied(use: Use) -> Tensor | None:
    """What a product keeps of its first factor, ``(rows, in)``; None of what is no product."""
    saved = _FIRST_FACTORS.get((type(use.node).__name__, use.slot))
    return None if saved is None else getattr(use.node, saved)
