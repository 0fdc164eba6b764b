r"""Laplace approximation with the diagonal of the generalised Gauss-Newton matrix.

.. math:: p = p_0 + \sum_n \mathrm{diag}\left(J_n^\top H_n J_n\right)

with the Jacobian :math:`J_n` of one example's outputs and the Hessian :math:`H_n` of its negative outer log
likelihood. With :math:`H_n = \sum_k \lambda_k u_k u_k^\top` the diagonal is :math:`\sum_k \lambda_k (J_n^\top
u_k)^2`. The likelihood has to be a sum over examples; one that couples them is refused, and
:mod:`laplace.transforms.dense_ggn` takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace.noise import fixed_directions
from laplace.transforms.states import DiagLaplaceState, Transform, add_diag
from laplace.transforms.states import init_diag as init
from laplace.transforms.states import sample_diag as sample
from laplace.transforms.trees import examples, flatten, per_example

__all__ = ["DiagLaplaceState", "build", "init", "sample", "update"]


def build(
    forward: Callable[[Any, Any], tuple[Any, Any]],
    outer_log_likelihood: Callable[[Any, Any], Tensor],
    init_prec_diag: Any = 0.0,
) -> Transform:
    """Make the transform.

    Args:
        forward: From parameters and a batch to outputs, whose first dimension are the examples, and auxiliary
            information (or ``torch.tensor([])``).
        outer_log_likelihood: From these outputs and the batch to the log likelihood, without auxiliary information: the
            sum over the batch, or one value per example.
        init_prec_diag: Initial precision, a number or a tree like the parameters.

    Returns:
        ``init(params)`` and ``update(state, batch, inplace=False)``.

    Example:
        >>> import torch
        >>> from laplace.transforms import diag_ggn
        >>> def forward(params, batch):
        ...     return batch["x"] @ params["w"] + params["b"], torch.tensor([])
        ...
        >>> def outer_log_likelihood(z, batch):
        ...     return -torch.nn.functional.cross_entropy(z, batch["y"], reduction="sum")
        ...
        >>> transform = diag_ggn.build(forward, outer_log_likelihood, init_prec_diag=1.0)
        >>> state = transform.init({"w": torch.zeros(2, 3), "b": torch.zeros(3)})
        >>> for _ in range(4):
        ...     state = transform.update(state, {"x": torch.randn(8, 2), "y": torch.randint(3, (8,))})
        ...
        >>> state.prec_diag["w"].shape
        torch.Size([2, 3])
        >>> diag_ggn.sample(state, torch.Size([5]))["w"].shape
        torch.Size([5, 2, 3])
    """
    return Transform(
        partial(init, init_prec_diag=init_prec_diag),
        partial(update, forward=forward, outer_log_likelihood=outer_log_likelihood),
    )


def update(
    state: DiagLaplaceState,
    batch: Any,
    forward: Callable[[Any, Any], tuple[Any, Any]],
    outer_log_likelihood: Callable[[Any, Any], Tensor],
    inplace: bool = False,
) -> DiagLaplaceState:
    """Add the diagonal of the GGN of one batch to the precision.

    Args:
        state: The state so far.
        batch: Whatever the two functions take; its tensors have the examples in their first dimension.
        forward: See :func:`build`.
        outer_log_likelihood: See :func:`build`.
        inplace: Change the tensors of ``state.prec_diag`` instead of making new ones.

    Returns:
        The state with the new precision and the auxiliary information of this batch.

    Raises:
        ValueError: If the likelihood couples the examples.

    Example:
        >>> import torch
        >>> from laplace.transforms import diag_ggn
        >>> batch = {"x": torch.ones(4, 2), "y": torch.ones(4)}
        >>> def forward(params, batch):
        ...     return batch["x"] @ params["w"], torch.tensor([])
        ...
        >>> def outer_log_likelihood(z, batch):
        ...     return -(z - batch["y"]).square().sum() / 2
        ...
        >>> state = diag_ggn.init({"w": torch.zeros(2)}, 1.0)
        >>> state = diag_ggn.update(state, batch, forward, outer_log_likelihood)
        >>> state.prec_diag["w"]
        tensor([5., 5.])
    """
    vector, unflatten = flatten(state.params)
    vector = vector.detach()
    with torch.no_grad():
        z, aux = forward(state.params, batch)
    values, vectors = torch.linalg.eigh(_output_hessians(z, batch, outer_log_likelihood))

    def diagonal(example: Any, columns: Tensor, weights: Tensor) -> Tensor:
        _, vjp = torch.func.vjp(lambda theta: flatten(forward(unflatten(theta), example)[0])[0], vector)
        rows = torch.func.vmap(lambda u: vjp(u)[0])(columns.T)
        return weights @ rows.square()

    width = len(vector) * values.shape[1]
    curvature = sum(d.sum(0) for d in per_example(diagonal, batch, vectors, values, width=width))
    return add_diag(state, curvature, aux, inplace)


def _output_hessians(z: Any, batch: Any, outer_log_likelihood: Callable[[Any, Any], Tensor]) -> Tensor:
    """Hessians of the negative log likelihood in every example's outputs, ``(batch, outputs, outputs)``."""
    leaves, rebuild, n = examples(z)
    sizes, shapes = [leaf[0].numel() for leaf in leaves], [leaf.shape for leaf in leaves]

    def loss(rows: Tensor) -> Tensor:
        parts = rows.split(sizes, 1)
        outputs = rebuild([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
        return -outer_log_likelihood(outputs, batch).sum()

    rows = torch.cat([leaf.reshape(n, -1) for leaf in leaves], 1)

    def hvp(v: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(loss), (rows,), (v,))[1]

    unit = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    hessians = torch.stack([hvp(row.expand_as(rows)) for row in unit], 2)
    _check_independent(hvp, hessians, rows)
    return (hessians + hessians.mT) / 2


def _check_independent(hvp: Callable[[Tensor], Tensor], hessians: Tensor, rows: Tensor) -> None:
    probe = fixed_directions(rows)
    expected = torch.einsum("nab,nb->na", hessians, probe)
    error, scale = (hvp(probe) - expected).norm(), expected.norm() + hessians.norm()
    if bool(error > 1e4 * torch.finfo(rows.dtype).eps * scale):
        raise ValueError(
            "outer_log_likelihood couples the examples of a batch, so the GGN is not a sum over examples. "
            "Use laplace.transforms.dense_ggn, or make the likelihood a sum."
        )
