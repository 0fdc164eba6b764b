r"""Laplace approximation with the dense Hessian of the negative log posterior.

.. math:: P = P_0 - \sum_{\text{batches}} \nabla^2 \log p

Away from a maximum the Hessian may be indefinite; :func:`sample` then refuses, and a larger ``init_prec`` is the
remedy.
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


def build(log_posterior: Callable[[Any, Any], tuple[Tensor, Any]], init_prec: Tensor | float = 0.0) -> Transform:
    """Make the transform.

    Args:
        log_posterior: From parameters and a batch to the log posterior (the sum over the batch, or one value per
            example; constants may be missing) and auxiliary information (or ``torch.tensor([])``).
        init_prec: Initial precision ``(entries, entries)``, or a multiple of the identity.

    Returns:
        ``init(params)`` and ``update(state, batch, inplace=False)``.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_hessian
        >>> def log_posterior(params, batch):
        ...     z = batch["x"] @ params["w"]
        ...     return -(z - batch["y"]).square().sum(-1) / 2, z.detach()
        ...
        >>> transform = dense_hessian.build(log_posterior, init_prec=1.0)
        >>> state = transform.init({"w": torch.zeros(2, 3)})
        >>> for _ in range(4):
        ...     state = transform.update(state, {"x": torch.randn(8, 2), "y": torch.randn(8, 3)})
        ...
        >>> state.prec.shape
        torch.Size([6, 6])
        >>> dense_hessian.sample(state, torch.Size([5]))["w"].shape
        torch.Size([5, 2, 3])
    """
    return Transform(partial(init, init_prec=init_prec), partial(update, log_posterior=log_posterior))


def update(
    state: DenseLaplaceState,
    batch: Any,
    log_posterior: Callable[[Any, Any], tuple[Tensor, Any]],
    inplace: bool = False,
) -> DenseLaplaceState:
    """Add the negative Hessian of one batch to the precision.

    Args:
        state: The state so far.
        batch: Whatever ``log_posterior`` takes.
        log_posterior: See :func:`build`.
        inplace: Change ``state.prec`` instead of making a new tensor.

    Returns:
        The state with the new precision and the auxiliary information of this batch.

    Raises:
        ValueError: If the parameters are no tree of tensors.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_hessian
        >>> batch = {"x": torch.ones(4, 2), "y": torch.ones(4)}
        >>> def log_posterior(params, batch):
        ...     return -(batch["x"] @ params["w"] - batch["y"]).square().sum() / 2, torch.tensor([])
        ...
        >>> state = dense_hessian.init({"w": torch.zeros(2)}, 1.0)
        >>> state = dense_hessian.update(state, batch, log_posterior)
        >>> state.prec
        tensor([[5., 4.],
                [4., 5.]])
    """
    vector, unflatten = flatten(state.params)
    vector = vector.detach()
    with torch.no_grad():
        _, aux = log_posterior(state.params, batch)
    gradient = torch.func.grad(lambda theta: -log_posterior(unflatten(theta), batch)[0].sum())
    basis = identity(len(vector), vector)
    rows = over_rows(lambda v: torch.func.jvp(gradient, (vector,), (v,))[1], basis, len(vector))
    return add_dense(state, torch.cat(list(rows)), aux, inplace)
