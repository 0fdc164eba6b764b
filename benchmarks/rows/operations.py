"""How many floating-point operations the mathematics of a fit needs; counted on the layers, not on an implementation."""

from __future__ import annotations

import torch
from torch import nn


def kron_gflop(model: nn.Module, x: torch.Tensor, columns: int) -> float:
    """Return the operations of one batch, in units of 10⁹: forward, backward of some columns, and half of each Gram matrix.

    Every layer is a product of `positions × d_in` with `d_in × d_out` per example. The first needs no gradient of its input.
    """
    layers = _layers(model, x)
    products = [2 * rows * d_in * d_out for rows, d_in, d_out in layers]
    grams = sum(rows * d_in * (d_in + 1) + columns * rows * d_out * (d_out + 1) for rows, d_in, d_out in layers)
    return (sum(products) + columns * sum(products[1:]) + grams) / 1e9


def diag_gflop(model: nn.Module, x: torch.Tensor, columns: int) -> float:
    """Return the operations of one batch, in units of 10⁹: forward, backward of some columns, and products for the squares.

    Where a layer sees one position, squares of its gradients are added up over the columns before one product with those of its
    inputs; where it sees several, a column's row is a product by itself.
    """
    layers = _layers(model, x)
    products = [2 * rows * d_in * d_out for rows, d_in, d_out in layers]
    squares = [value * (columns if rows > len(x) else 1) for value, (rows, _, _) in zip(products, layers, strict=True)]
    return (sum(products) + columns * sum(products[1:]) + sum(squares)) / 1e9


def variance_gflop(model: nn.Module, x: torch.Tensor, outputs: int, turned: bool) -> float:
    """Return the operations of the outputs' variances under one prior, in units of 10⁹, by the cheaper of two forms per layer.

    A backward pass of every output, and of the weights' variances in their eigenvectors' basis: inputs and gradients are turned
    into it, or the rows that they give (`turned`, as Kronecker factors ask for and a diagonal does not); then rows of every
    output, or pairs of positions, are weighted.
    """
    layers = _layers(model, x)
    products = [2 * rows * d_in * d_out for rows, d_in, d_out in layers]
    weighted = sum(_variances(rows // len(x), d_in, d_out, outputs, turned) for rows, d_in, d_out in layers)
    return (sum(products) + outputs * sum(products[1:]) + len(x) * weighted) / 1e9


def _variances(positions: int, d_in: int, d_out: int, outputs: int, turned: bool) -> int:
    """Return the operations that an example's variances of one layer take beyond its gradients."""
    weights, pairs = 2 * d_in * d_out, positions * (positions + 1) // 2
    turn = 2 * positions * (d_in**2 + outputs * d_out**2) if turned else 0
    turn_rows = outputs * weights * (d_in + d_out) if turned else 0
    rows = outputs * weights * (positions if positions > 1 else 0) + outputs * weights
    return min(turn + pairs * (weights + 2 * outputs * d_out), turn + rows, turn_rows + rows)


def _layers(model: nn.Module, x: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return of every layer the positions of all examples, and its inputs and outputs at each."""
    layers: list[tuple[int, int, int]] = []

    def note(module: nn.Module, _: object, out: torch.Tensor) -> None:
        if isinstance(module, nn.MultiheadAttention):  # whose products are no calls of modules
            width = module.embed_dim
            rows = out[0].numel() // width
            layers.extend([(rows, width, 3 * width), (rows, width, width)])
            return
        d_out, d_in = module.weight.shape[0], module.weight[0].numel()
        layers.append((out.numel() // d_out, d_in, d_out))

    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return layers
