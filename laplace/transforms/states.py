"""Normal distributions over parameter trees, dense and diagonal: what all transforms start, update and sample from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace.linalg.dense import invsqrt_precision
from laplace.transforms.trees import flatten, identity, tree_map

SCALAR = torch.Size([])  # the shape of one draw


class Transform(NamedTuple):
    """The functions of one algorithm with its settings filled in.

    Attributes:
        init: From a parameter tree to a state.
        update: From a state and a batch to the next state; ``inplace=True`` changes the given one.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_hessian
        >>> def log_posterior(params, batch):
        ...     return -(batch @ params).square().sum() / 2, torch.tensor([])
        ...
        >>> init, update = dense_hessian.build(log_posterior)
        >>> update(init(torch.zeros(2)), torch.ones(4, 2)).prec
        tensor([[4., 4.],
                [4., 4.]])
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


class DenseLaplaceState(NamedTuple):
    """Normal distribution over parameters with a dense precision matrix.

    Attributes:
        params: Mean, a tree of tensors.
        prec: Precision ``(entries, entries)`` over the flattened tree.
        aux: What the user's function returned beside its value for the last batch.

    Example:
        >>> import torch
        >>> from laplace.transforms import DenseLaplaceState, dense_ggn
        >>> state = DenseLaplaceState(params=torch.zeros(2), prec=2 * torch.eye(2))
        >>> dense_ggn.sample(state).shape
        torch.Size([2])
    """

    params: Any
    prec: Tensor
    aux: Any = None


class DiagLaplaceState(NamedTuple):
    """Normal distribution over parameters with a diagonal precision matrix.

    Attributes:
        params: Mean, a tree of tensors.
        prec_diag: Diagonal of the precision, a tree like ``params``.
        aux: What the user's function returned beside its value for the last batch.

    Example:
        >>> import torch
        >>> from laplace.transforms import DiagLaplaceState, diag_ggn
        >>> state = DiagLaplaceState(params=torch.zeros(2), prec_diag=torch.full((2,), 2.0))
        >>> diag_ggn.sample(state).shape
        torch.Size([2])
    """

    params: Any
    prec_diag: Any
    aux: Any = None


def init_dense(params: Any, init_prec: Tensor | float = 0.0) -> DenseLaplaceState:
    """A state before any batch.

    Args:
        params: Mean, a tree of tensors.
        init_prec: Initial precision ``(entries, entries)``, or a multiple of the identity.

    Returns:
        The state, which shares its ``params`` with the argument.

    Raises:
        ValueError: If the precision does not fit the parameters, or these are no tree of tensors.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_ggn
        >>> dense_ggn.init({"w": torch.zeros(2)}, 3.0).prec
        tensor([[3., 0.],
                [0., 3.]])
    """
    vector, _ = flatten(params)
    size = len(vector)
    if not isinstance(init_prec, Tensor) or init_prec.ndim == 0:
        return DenseLaplaceState(params, init_prec * identity(size, vector.detach()))
    if init_prec.shape != (size, size):
        raise ValueError(f"init_prec has shape {tuple(init_prec.shape)}; valid are a number or ({size}, {size}).")
    return DenseLaplaceState(params, init_prec.to(vector, copy=True))


def add_dense(state: DenseLaplaceState, curvature: Tensor, aux: Any, inplace: bool) -> DenseLaplaceState:
    """The state after one more batch; in place, the tensor ``state.prec`` itself changes."""
    curvature = curvature.detach()
    prec = state.prec.add_(curvature) if inplace else state.prec + curvature
    return DenseLaplaceState(state.params, prec, aux)


def sample_dense(
    state: DenseLaplaceState, sample_shape: torch.Size = SCALAR, generator: torch.Generator | None = None
) -> Any:
    """Draw parameter trees from the normal distribution of a state.

    Args:
        state: The state.
        sample_shape: Shape of the draws; a single tree by default.
        generator: Source of the noise.

    Returns:
        A tree like ``state.params`` whose leaves have ``sample_shape`` in front.

    Raises:
        ValueError: If the precision is not positive definite.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_ggn
        >>> state = dense_ggn.init({"w": torch.zeros(2)}, 3.0)
        >>> dense_ggn.sample(state, torch.Size([5]))["w"].shape
        torch.Size([5, 2])
    """
    mean, unflatten = flatten(state.params)
    noise = torch.randn(*sample_shape, len(mean), dtype=mean.dtype, device=mean.device, generator=generator)
    return unflatten(mean.detach() + noise @ invsqrt_precision(state.prec).T)


def init_diag(params: Any, init_prec_diag: Any = 0.0) -> DiagLaplaceState:
    """A state before any batch.

    Args:
        params: Mean, a tree of tensors.
        init_prec_diag: Initial precision, a number or a tree like ``params``.

    Returns:
        The state, which shares its ``params`` with the argument.

    Raises:
        ValueError: If the precision does not fit the parameters, or these are no tree of tensors.

    Example:
        >>> import torch
        >>> from laplace.transforms import diag_ggn
        >>> diag_ggn.init({"w": torch.zeros(2)}, 3.0).prec_diag
        {'w': tensor([3., 3.])}
    """
    if isinstance(init_prec_diag, (int, float)) or (isinstance(init_prec_diag, Tensor) and init_prec_diag.ndim == 0):
        return DiagLaplaceState(params, tree_map(lambda p: torch.full_like(p.detach(), float(init_prec_diag)), params))
    ours, theirs = tree_map(lambda t: tuple(t.shape), params), tree_map(lambda t: tuple(t.shape), init_prec_diag)
    if ours != theirs:
        raise ValueError(f"init_prec_diag has shapes {theirs}; valid are a number or a tree of shapes {ours}.")
    return DiagLaplaceState(params, tree_map(lambda p, d: d.to(p, copy=True), params, init_prec_diag))


def add_diag(state: DiagLaplaceState, curvature: Tensor, aux: Any, inplace: bool) -> DiagLaplaceState:
    """The state after one more batch, from a diagonal ``(entries,)``; in place, the tensors of ``prec_diag`` change."""
    _, unflatten = flatten(state.params)
    total = tree_map(lambda d, c: d.add_(c) if inplace else d + c, state.prec_diag, unflatten(curvature.detach()))
    return DiagLaplaceState(state.params, total, aux)


def sample_diag(
    state: DiagLaplaceState, sample_shape: torch.Size = SCALAR, generator: torch.Generator | None = None
) -> Any:
    """Draw parameter trees from the normal distribution of a state.

    Args:
        state: The state.
        sample_shape: Shape of the draws; a single tree by default.
        generator: Source of the noise.

    Returns:
        A tree like ``state.params`` whose leaves have ``sample_shape`` in front.

    Raises:
        ValueError: If the precision is not positive.

    Example:
        >>> import torch
        >>> from laplace.transforms import diag_ggn
        >>> state = diag_ggn.init({"w": torch.zeros(2)}, 3.0)
        >>> diag_ggn.sample(state, torch.Size([5]))["w"].shape
        torch.Size([5, 2])
    """
    mean, unflatten = flatten(state.params)
    prec, _ = flatten(state.prec_diag)
    if not bool((prec > 0).all()):
        raise ValueError("The precision is not positive everywhere; start from a larger init_prec_diag.")
    noise = torch.randn(*sample_shape, len(mean), dtype=mean.dtype, device=mean.device, generator=generator)
    return unflatten(mean.detach() + noise * prec.rsqrt())
