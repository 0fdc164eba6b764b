r"""Laplace approximation with the dense empirical Fisher.

.. math:: P = P_0 + \sum_n \nabla\log p_n \nabla\log p_n^\top
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from laplace.transforms.gradients import per_sample_gradients
from laplace.transforms.states import DenseLaplaceState, Transform, add_dense
from laplace.transforms.states import init_dense as init
from laplace.transforms.states import sample_dense as sample

__all__ = ["DenseLaplaceState", "build", "init", "sample", "update"]


def build(
    log_posterior: Callable[[Any, Any], tuple[Tensor, Any]], per_sample: bool = False, init_prec: Tensor | float = 0.0
) -> Transform:
    """Make the transform.

    Args:
        log_posterior: From parameters and a batch to the log posterior and auxiliary information (or
            ``torch.tensor([])``).
        per_sample: Whether it returns one value per example; otherwise it is called with one example at a time, as a
            batch of one.
        init_prec: Initial precision ``(entries, entries)``, or a multiple of the identity.

    Returns:
        ``init(params)`` and ``update(state, batch, inplace=False)``.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_ef
        >>> def log_posterior(params, batch):
        ...     z = batch["x"] @ params["w"]
        ...     return -(z - batch["y"]).square().sum(-1) / 2, z.detach()
        ...
        >>> transform = dense_ef.build(log_posterior, per_sample=True, init_prec=1.0)
        >>> state = transform.init({"w": torch.zeros(2, 3)})
        >>> for _ in range(4):
        ...     state = transform.update(state, {"x": torch.randn(8, 2), "y": torch.randn(8, 3)})
        ...
        >>> state.prec.shape
        torch.Size([6, 6])
        >>> dense_ef.sample(state, torch.Size([5]))["w"].shape
        torch.Size([5, 2, 3])
    """
    return Transform(
        partial(init, init_prec=init_prec), partial(update, log_posterior=log_posterior, per_sample=per_sample)
    )


def update(
    state: DenseLaplaceState,
    batch: Any,
    log_posterior: Callable[[Any, Any], tuple[Tensor, Any]],
    per_sample: bool = False,
    inplace: bool = False,
) -> DenseLaplaceState:
    """Add the empirical Fisher of one batch to the precision.

    Args:
        state: The state so far.
        batch: Whatever ``log_posterior`` takes; its tensors have the examples in their first dimension.
        log_posterior: See :func:`build`.
        per_sample: See :func:`build`.
        inplace: Change ``state.prec`` instead of making a new tensor.

    Returns:
        The state with the new precision and the auxiliary information of this batch.

    Raises:
        ValueError: If the parameters are no tree of tensors, or ``log_posterior`` does not return what ``per_sample`` says.

    Example:
        >>> import torch
        >>> from laplace.transforms import dense_ef
        >>> batch = {"x": torch.ones(4, 2), "y": torch.ones(4)}
        >>> def log_posterior(params, batch):
        ...     return -(batch["x"] @ params["w"] - batch["y"]).square().sum() / 2, torch.tensor([])
        ...
        >>> state = dense_ef.init({"w": torch.zeros(2)}, 1.0)
        >>> state = dense_ef.update(state, batch, log_posterior)
        >>> state.prec
        tensor([[5., 4.],
                [4., 5.]])
    """
    gradients, aux = per_sample_gradients(log_posterior, state.params, batch, per_sample)
    return add_dense(state, sum(g.T @ g for g in gradients), aux, inplace)
