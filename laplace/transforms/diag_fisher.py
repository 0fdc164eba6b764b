r"""Laplace approximation with the diagonal empirical Fisher.

.. math:: p = p_0 + \sum_n (\nabla\log p_n)^2 \quad\text{entry by entry}
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from laplace.transforms.gradients import per_sample_gradients
from laplace.transforms.states import DiagLaplaceState, Transform, add_diag
from laplace.transforms.states import init_diag as init
from laplace.transforms.states import sample_diag as sample

__all__ = ["DiagLaplaceState", "build", "init", "sample", "update"]


def build(
    log_posterior: Callable[[Any, Any], tuple[Tensor, Any]], per_sample: bool = False, init_prec_diag: Any = 0.0
) -> Transform:
    """Make the transform.

    Args:
        log_posterior: From parameters and a batch to the log posterior and auxiliary information (or
            ``torch.tensor([])``).
        per_sample: Whether it returns one value per example; otherwise it is called with one example at a time, as a
            batch of one.
        init_prec_diag: Initial precision, a number or a tree like the parameters.

    Returns:
        ``init(params)`` and ``update(state, batch, inplace=False)``.

    Example:
        >>> import torch
        >>> from laplace.transforms import diag_fisher
        >>> def log_posterior(params, batch):
        ...     z = batch["x"] @ params["w"]
        ...     return -(z - batch["y"]).square().sum(-1) / 2, z.detach()
        ...
        >>> transform = diag_fisher.build(log_posterior, per_sample=True, init_prec_diag=1.0)
        >>> state = transform.init({"w": torch.zeros(2, 3)})
        >>> for _ in range(4):
        ...     state = transform.update(state, {"x": torch.randn(8, 2), "y": torch.randn(8, 3)})
        ...
        >>> state.prec_diag["w"].shape
        torch.Size([2, 3])
        >>> diag_fisher.sample(state, torch.Size([5]))["w"].shape
        torch.Size([5, 2, 3])
    """
    return Transform(
        partial(init, init_prec_diag=init_prec_diag),
        partial(update, log_posterior=log_posterior, per_sample=per_sample),
    )


def update(
    state: DiagLaplaceState,
    batch: Any,
    log_posterior: Callable[[Any, Any], tuple[Tensor, Any]],
    per_sample: bool = False,
    inplace: bool = False,
) -> DiagLaplaceState:
    """Add the diagonal empirical Fisher of one batch to the precision.

    Args:
        state: The state so far.
        batch: Whatever ``log_posterior`` takes; its tensors have the examples in their first dimension.
        log_posterior: See :func:`build`.
        per_sample: See :func:`build`.
        inplace: Change the tensors of ``state.prec_diag`` instead of making new ones.

    Returns:
        The state with the new precision and the auxiliary information of this batch.

    Raises:
        ValueError: If the parameters are no tree of tensors, or ``log_posterior`` does not return what ``per_sample`` says.

    Example:
        >>> import torch
        >>> from laplace.transforms import diag_fisher
        >>> batch = {"x": torch.ones(4, 2), "y": torch.ones(4)}
        >>> def log_posterior(params, batch):
        ...     return -(batch["x"] @ params["w"] - batch["y"]).square().sum() / 2, torch.tensor([])
        ...
        >>> state = diag_fisher.init({"w": torch.zeros(2)}, 1.0)
        >>> state = diag_fisher.update(state, batch, log_posterior)
        >>> state.prec_diag["w"]
        tensor([5., 5.])
    """
    gradients, aux = per_sample_gradients(log_posterior, state.params, batch, per_sample)
    return add_diag(state, sum(g.square().sum(0) for g in gradients), aux, inplace)
