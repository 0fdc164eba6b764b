r"""Weights that no module multiplies, but a function: the projections of attention, and the two weights of recurrent cells.

They are found in the graph of a forward pass: a product :math:`a W^\top` is a node that keeps :math:`a`, the gradient of what
comes out of it is :math:`g`, and so the curvature of :math:`W` follows from the two as that of a linear layer does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from laplace.capture.calls import Call, nodes

_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_WEIGHTS = ("in_proj_weight", "out_proj.weight", "weight_ih", "weight_hh")


@dataclass(frozen=True)
class Product:
    """A weight that is multiplied by rows.

    Attributes:
        weight: ``(out, in)``.
        batch_second: Whether rows are positions first, then examples, as attention has them inside.
    """

    weight: Tensor
    batch_second: bool


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
    known = isinstance(module, (nn.MultiheadAttention, *_CELLS)) and weight in _WEIGHTS
    full = f"{owner}.{weight}" if owner else weight
    return full if known and _parameter(model, full) is not None else None


def product(model: nn.Module, weight: str) -> Product | None:
    """The products of a weight by its name; None if it is no parameter's name."""
    value = _parameter(model, weight)
    cell = isinstance(_module(model, weight.rpartition(".")[0]), _CELLS)
    return None if value is None else Product(value, not cell)


def calls_of(output: Tensor, products: dict[str, Product], n: int) -> Iterator[Call]:
    """Every product with one of the weights that an output depends on.

    Args:
        output: The model's output, with its graph.
        products: By name.
        n: Number of examples.
    """
    wanted = {id(value.weight): name for name, value in products.items()}
    for node in nodes(output) if products else ():
        if type(node).__name__ not in ("AddmmBackward0", "MmBackward0"):
            continue
        name = wanted.get(id(_turned_leaf(node.next_functions[-1][0])))
        rows = _multiplied(node) if name is not None else None
        if rows is not None:
            positions = len(rows) // n if products[name].batch_second and len(rows) % n == 0 else 0
            shape = torch.Size((len(rows), len(products[name].weight)))
            call = Call(name, rows, rows._version, GradientEdge(node, 0), shape, rows.dtype, positions)
            call.value = call.in_order(rows.detach())
            yield call


def _turned_leaf(node: Any) -> Tensor | None:
    """The parameter whose transpose a node is, through changes of type."""
    turned = False
    while node is not None and type(node).__name__ in ("TBackward0", "ToCopyBackward0"):
        turned = turned or type(node).__name__ == "TBackward0"
        node = node.next_functions[0][0]
    return getattr(node, "variable", None) if turned else None


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    owner, _, key = name.rpartition(".")
    module = _module(model, owner)
    return None if module is None else module._parameters.get(key)


def _multiplied(node: Any) -> Tensor | None:
    """What a product keeps of its first factor, ``(rows, in)``."""
    return node._saved_mat1 if type(node).__name__ == "AddmmBackward0" else node._saved_self
