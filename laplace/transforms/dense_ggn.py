r"""Laplace approximation with a dense generalised Gauss-Newton precision.

.. math:: P = P_0 + \sum_{\text{batches}} J_f(\theta)^\top H_l(z) J_f(\theta)

where :math:`z = f(\theta)` are the outputs for the batch and :math:`H_l` is the Hessian of the negative outer log
likelihood in them. It equals the Fisher information where the outer likelihood is of the exponential family with
natural parameter :math:`z` (Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020); see
Daxberger et al., "Laplace Redux" (NeurIPS 2021) for its use here. Nothing is assumed about the likelihood: it may
couple the examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace.transforms.states import DenseLaplaceState, Transform, add_dense
from laplace.transforms.states import init_dense as init
from laplace.transforms.states import sample_dense as sample
from laplace.transforms.trees import flatten, identity, over_rows

__all__ = ["DenseLaplaceState", "build", "init", "sample", "update"]


def build(
    forward: Callable[[Any, Any], tuple[Any, Any]],
    outer_log_likelihood: Callable[[Any, Any], Tensor],
    init_prec: Tensor | float = 0.0,
) -> Transform:
    """Make the transform.

    Args:
        forward: From parameters and a batch to outputs, not reduced over the batch, and auxiliary information (or
            ``torch.tensor([])``).
        outer_log_likelihood: From these outputs and the batch to the log likelihood, without auxiliary information: the
            sum over the batch, or one value per example.
        init_prec: Initial precision ``(entries, entries)``, or a multiple of the identity.

    Returns:
        ``init(params)`` and ``update(state, batch, inplace=False)``.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_ggn
        >>> def forward(params, batch):
        ...     return batch["x"] @ params["w"] + params["b"], torch.tensor([])
        ...
        >>> def outer_log_likelihood(z, batch):
        ...     return -torch.nn.functional.cross_entropy(z, batch["y"], reduction="sum")
        ...
        >>> transform = dense_ggn.build(forward, outer_log_likelihood, init_prec=1.0)
        >>> state = transform.init({"w": torch.zeros(2, 3), "b": torch.zeros(3)})
        >>> for _ in range(4):
        ...     state = transform.update(state, {"x": torch.randn(8, 2), "y": torch.randint(3, (8,))})
        ...
        >>> state.prec.shape
        torch.Size([9, 9])
        >>> dense_ggn.sample(state, torch.Size([5]))["w"].shape
        torch.Size([5, 2, 3])
    """
    return Transform(
        partial(init, init_prec=init_prec),
        partial(update, forward=forward, outer_log_likelihood=outer_log_likelihood),
    )


def update(
    state: DenseLaplaceState,
    batch: Any,
    forward: Callable[[Any, Any], tuple[Any, Any]],
    outer_log_likelihood: Callable[[Any, Any], Tensor],
    inplace: bool = False,
) -> DenseLaplaceState:
    """Add the GGN of one batch to the precision.

    Args:
        state: The state so far.
        batch: Whatever the two functions take.
        forward: See :func:`build`.
        outer_log_likelihood: See :func:`build`.
        inplace: Change ``state.prec`` instead of making a new tensor.

    Returns:
        The state with the new precision and the auxiliary information of this batch.

    Raises:
        ValueError: If the parameters are no tree of tensors.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_ggn
        >>> batch = {"x": torch.ones(4, 2), "y": torch.ones(4)}
        >>> def forward(params, batch):
        ...     return batch["x"] @ params["w"], torch.tensor([])
        ...
        >>> def outer_log_likelihood(z, batch):
        ...     return -(z - batch["y"]).square().sum() / 2
        ...
        >>> state = dense_ggn.init({"w": torch.zeros(2)}, 1.0)
        >>> state = dense_ggn.update(state, batch, forward, outer_log_likelihood)
        >>> state.prec
        tensor([[5., 4.],
                [4., 5.]])
    """
    vector, unflatten = flatten(state.params)
    vector = vector.detach()

    def outputs(theta: Tensor) -> tuple[Tensor, Any]:
        z, aux = forward(unflatten(theta), batch)
        return flatten(z)[0], (z, aux)

    with torch.no_grad():
        z, (tree, aux) = outputs(vector)
    _, unflatten_z = flatten(tree)
    loss_gradient = torch.func.grad(lambda z: -outer_log_likelihood(unflatten_z(z), batch).sum())
    curvature = _ggn(lambda theta: outputs(theta)[0], loss_gradient, vector, z)
    return add_dense(state, curvature, aux, inplace)


def _ggn(
    outputs: Callable[[Tensor], Tensor], loss_gradient: Callable[[Tensor], Tensor], theta: Tensor, z: Tensor
) -> Tensor:
    """``Jᵀ H J`` by rows of ``J`` where there are fewer outputs than parameters, else by columns of the product."""

    def hvp(v: Tensor) -> Tensor:
        return torch.func.jvp(loss_gradient, (z,), (v,))[1]

    _, vjp = torch.func.vjp(outputs, theta)
    width = max(len(z), len(theta))
    if len(z) <= len(theta):
        hessian = torch.cat(list(over_rows(hvp, identity(len(z), z), width)))
        jacobian = torch.cat(list(over_rows(lambda v: vjp(v)[0], identity(len(z), z), width)))
        return jacobian.T @ hessian @ jacobian

    def product(v: Tensor) -> Tensor:
        return vjp(hvp(torch.func.jvp(outputs, (theta,), (v,))[1]))[0]

    return torch.cat(list(over_rows(product, identity(len(theta), theta), width)))
