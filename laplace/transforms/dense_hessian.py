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
    """
    vector, unflatten = flatten(state.params)
    vector = vector.detach()
    with torch.no_grad():
        _, aux = log_posterior(state.params, batch)
    gradient = torch.func.grad(lambda theta: -log_posterior(unflatten(theta), batch)[0].sum())
    basis = identity(len(vector), vector)
    rows = over_rows(lambda v: torch.func.jvp(gradient, (vector,), (v,))[1], basis, len(vector))
    return add_dense(state, torch.cat(list(rows)), aux, inplace)
