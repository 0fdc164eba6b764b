r"""Columns :math:`v_k` of a root of the Hessian in the outputs, :math:`\sum_k v_k v_k^\top`, for each position of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def diagonal_columns(root: Tensor) -> Iterator[Tensor]:
    """Columns of a diagonal matrix per position, from its diagonal ``(batch, …, outputs)``."""
    for j in range(root.shape[-1]):
        column = torch.zeros_like(root)
        column[..., j] = root[..., j]
        yield column


def restricted_columns(columns: Iterator[Tensor], f: Tensor, outputs: Sequence[int]) -> Iterator[Tensor]:
    r"""Columns of a root of the rows and columns :math:`\Lambda_{SS}` of a matrix :math:`\Lambda`, zero elsewhere.

    There are as many as outputs in :math:`S`, however many columns the root of :math:`\Lambda` has.

    Args:
        columns: Of a root of :math:`\Lambda`, each shaped like ``f``.
        f: Outputs ``(batch, …, outputs)``.
        outputs: The indices :math:`S`.
    """
    chosen = torch.tensor(list(outputs), device=f.device)
    total = f.new_zeros(*f.shape[:-1], len(chosen), len(chosen), dtype=torch.float64)
    for column in columns:
        some = column[..., chosen].double()
        total += some[..., :, None] * some[..., None, :]
    values, vectors = torch.linalg.eigh(total)
    roots = (vectors * values.clamp(min=0).sqrt()[..., None, :]).to(f.dtype)
    for k in range(len(chosen)):
        column = torch.zeros_like(f)
        column[..., chosen] = roots[..., k]
        yield column


def eigen_columns(nll: Callable[[Tensor, Tensor], Tensor], f: Tensor, y: Tensor, identity: str) -> Iterator[Tensor]:
    """Scaled eigenvectors of the Hessian that automatic differentiation gives, each shaped like ``f``.

    Args:
        nll: Negative log likelihood of every term, ``(batch, …)``.
        f: Outputs ``(batch, …, outputs)``.
        y: Targets.
        identity: The likelihood's name, for messages.

    Raises:
        ValueError: If the Hessian has a negative eigenvalue.
    """
    values, vectors = torch.linalg.eigh(_hessian(nll, f, y))
    low, high = float(values.min()), float(values.abs().max())
    if low < -1e-8 * high:
        raise ValueError(
            f"The Hessian of {identity} in the outputs has the eigenvalue {low:.3g}: this likelihood is not "
            "log-concave. Give it root_columns(f, y), with a root of its Fisher information."
        )
    columns = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return iter(columns.to(f.dtype).unbind(-1))


def _hessian(nll: Callable[[Tensor, Tensor], Tensor], f: Tensor, y: Tensor) -> Tensor:
    """Hessians of the terms ``(batch, …, outputs, outputs)``."""
    with torch.enable_grad():
        leaf = f.detach().double().requires_grad_()
        gradient = torch.autograd.grad(nll(leaf, y).sum(), leaf, create_graph=True)[0]
        if not gradient.requires_grad:
            return torch.zeros(*f.shape, f.shape[-1], dtype=torch.float64, device=f.device)
        rows = [torch.autograd.grad(gradient[..., j].sum(), leaf, retain_graph=True)[0] for j in range(f.shape[-1])]
    hessian = torch.stack(rows, -2)
    return (hessian + hessian.mT) / 2
