r"""Weights and biases that no module multiplies or adds itself: of attention, recurrent layers, functions, and tied ones.

They are found in the graph of a forward pass: a product :math:`a W^\top` is a node that keeps :math:`a`, the gradient of what
comes out of it is :math:`g`, and so the curvature of :math:`W` follows from the two as that of a linear layer does; a
convolution is a node that keeps its input, of which :math:`a` are the patches. Several products with a weight are like several
calls of a layer: their positions stand one after the other. Where a product is with some rows of a weight, as attention's over
a memory, the output gradients of the other rows are zero. What is added to a product or convolution is a bias, whose output
gradients are those of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from laplace.capture.calls import Call
from laplace.capture.geometry import Geometry, reads_all
from laplace.capture.use_rules import VIEWS
from laplace.capture.uses import Use, uses_of

_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_FIRST_FACTORS = {("AddmmBackward0", 2): "_saved_mat1", ("MmBackward0", 1): "_saved_self"}
_CONVOLUTION = "ConvolutionBackward0"
_BIASES = {("AddmmBackward0", 0), (_CONVOLUTION, 2)}
_SUMS = {("AddBackward0", 0): 1, ("AddBackward0", 1): 0}  # which of the inputs the other one is
_PRODUCTS = ("MmBackward0", "BmmBackward0", _CONVOLUTION)
_TURNS = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
_PARTS = ("SplitBackward0", "SplitWithSizesBackward0")  # of stacked weights
_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


@dataclass(frozen=True)
class Product:
    """A weight that is multiplied by rows or convolved, or a bias that is added to what comes out.

    Attributes:
        weight: ``(out, in)``, or transposed; of a convolution ``(out, in, …)``; of a bias ``(out,)``.
        batch_second: Whether rows are positions first, then examples, as attention has them inside.
        transposed: Whether the weight is ``(in, out)``, as that of a transposed convolution ``(in, out, …)`` is.
        channels_first: Whether the outputs are ``(batch, out, …)``, as those of convolutions are.
        geometry: Where a convolution's patches lie; None of a product or a bias.
    """

    weight: Tensor
    batch_second: bool
    transposed: bool = False
    channels_first: bool = False
    geometry: Geometry | None = None

    @property
    def form(self) -> tuple[bool, bool, Geometry | None]:
        """How rows are made, which has to be the same in all uses of a weight."""
        return self.transposed, self.channels_first, self.geometry


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
        if not made or None in made or len({product.form for _, product in made}) > 1:
            misused.add(name)
            continue
        calls += [call for call, _ in made]
        found[name] = made[0][1]
    return calls, found, misused


def _call(name: str, use: Use, product: Product, n: int) -> tuple[Call, Product] | None:
    """A use as a call, and how its rows are made; None if it is neither a product, a convolution nor a bias of one."""
    if product.weight.ndim == 1:
        return _bias_call(name, use, product)
    if product.weight.ndim > 2:
        return _convolution_call(name, use, product)
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
    return call, replace(product, transposed=not turned)


def _convolution_call(name: str, use: Use, product: Product) -> tuple[Call, Product] | None:
    """A convolution of all channels with the weight as it is."""
    node = use.node
    if (type(node).__name__, use.slot) != (_CONVOLUTION, 1) or node._saved_groups != 1 or not _is_whole(use):
        return None
    if node._saved_transposed and not reads_all(node._saved_stride, node._saved_output_padding):
        return None
    x, metadata = node._saved_input, node._input_metadata[0]
    call = Call(name, x.detach(), x._version, GradientEdge(node, 0), torch.Size(metadata.shape), metadata.dtype)
    geometry = Geometry.of_node(node, tuple(product.weight.shape[2:]))
    return call, replace(product, transposed=node._saved_transposed, channels_first=True, geometry=geometry)


def _bias_call(name: str, use: Use, product: Product) -> tuple[Call, Product] | None:
    """A sum with what comes out of a product or convolution, of which a bias has one entry for each output or channel."""
    kind = type(use.node).__name__, use.slot
    metadata = use.node._input_metadata[0]
    shape = torch.Size(metadata.shape)
    other = use.node.next_functions[_SUMS[kind]][0] if kind in _SUMS else None
    if not _is_whole(use) or not (kind in _BIASES or (_is_product(other) and shape[-1] == len(product.weight))):
        return None
    nothing = torch.empty(shape[0], 0)
    call = Call(name, nothing, nothing._version, GradientEdge(use.node, 0), shape, metadata.dtype)
    return call, replace(product, channels_first=kind[0] == _CONVOLUTION)


def _is_whole(use: Use) -> bool:
    """Whether a use is of the parameter itself, in whatever type."""
    return all(type(node).__name__ == "ToCopyBackward0" for node, _ in use.views)


def _is_product(node: Any) -> bool:
    """Whether a node gives what comes out of a product with rows, in another shape."""
    while node is not None and type(node).__name__ in VIEWS:
        node = node.next_functions[0][0]
    return type(node).__name__ in _PRODUCTS


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
