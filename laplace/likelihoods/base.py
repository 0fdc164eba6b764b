r"""The two likelihoods: loss, gradient, Hessian root and sampled gradients with respect to the network's outputs.

Classification: :math:`-\log p(y \mid f) = -\log \mathrm{softmax}(f)_y`. Regression: :math:`\tfrac12 \lVert f - y\rVert^2`
(unit noise; the observation noise enters later as a factor). Outputs have shape ``(batch, …, outputs)``; every position
between the first and the last dimension is a likelihood term of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace import noise
from laplace.enums import Likelihood
from laplace.errors import NonFiniteError
from laplace.likelihoods.mistakes import check_classes
from laplace.linalg.precision import double


def check_targets(likelihood: Likelihood, f: Tensor, y: Tensor, offset: int = 0) -> None:
    """Refuse outputs that are not finite, and targets that do not fit them.

    Raises:
        ValueError: On wrong shape, float labels for classification, labels out of range.
        NonFiniteError: On NaN or Inf in regression targets or in the outputs.
    """
    check_finite("The model's output", f, offset)
    check_shapes(likelihood, f, y, offset)


def check_shapes(likelihood: Likelihood, f: Tensor, y: Tensor, offset: int = 0) -> None:
    """Refuse targets that do not fit the shape of the outputs, as :func:`check_targets` does."""
    if likelihood is Likelihood.REGRESSION:
        if y.shape != f.shape:
            raise ValueError(
                f"Targets of shape {tuple(y.shape)} do not match outputs of shape {tuple(f.shape)}; "
                "regression needs one target per output, so (batch, outputs)."
            )
        check_finite("The regression target", y, offset)
        return
    check_classes(f, y)
    if y.is_floating_point() or y.dtype is torch.bool:
        raise ValueError(
            f"Classification needs integer class labels, but the targets are {y.dtype}. "
            "Convert them with .long(), or use likelihood='regression'."
        )
    if y.shape != f.shape[:-1]:
        raise ValueError(
            f"Labels of shape {tuple(y.shape)} do not match outputs {tuple(f.shape)}: (batch, …, classes)."
        )
    wrong = ((y < 0) | (y >= f.shape[-1])).reshape(y.shape[0], -1).any(1)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        value = y[first].reshape(-1)
        value = int(value[(value < 0) | (value >= f.shape[-1])][0])
        raise ValueError(
            f"Label {value} of example {offset + first} is out of range: the model has {f.shape[-1]} outputs, so labels "
            f"must lie in 0…{f.shape[-1] - 1}. {int(wrong.sum())} example(s) of this batch are affected."
        )


def check_finite(what: str, values: Tensor, offset: int) -> None:
    """Raise :class:`NonFiniteError` naming the rows of ``values`` that hold NaN or Inf."""
    if bool(torch.isfinite(values.sum())):
        return
    wrong = (~torch.isfinite(values)).reshape(values.shape[0], -1).any(1)
    if bool(wrong.any()):  # a finite batch may overflow in its sum alone
        raise NonFiniteError(what, [offset + int(i) for i in wrong.nonzero().flatten()])


def loss_sum(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """Sum over examples of the negative log likelihood (up to the noise and its constant), float64 scalar."""
    f, y = double(f), y.to("cpu") if f.device.type == "mps" else y
    if likelihood is Likelihood.REGRESSION:
        return 0.5 * (f - y.double()).square().sum()
    return torch.nn.functional.cross_entropy(f.reshape(-1, f.shape[-1]), y.reshape(-1).long(), reduction="sum")


def gradient(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """Gradient of the loss with respect to the outputs, shaped like ``f``."""
    if likelihood is Likelihood.REGRESSION:
        return f - y.to(f.dtype)
    return f.softmax(-1) - torch.nn.functional.one_hot(y.long(), f.shape[-1]).to(f.dtype)


def hessian_root(likelihood: Likelihood, f: Tensor) -> Iterator[Tensor]:
    r"""Columns :math:`v_k` with :math:`\sum_k v_k v_k^\top = \nabla^2_f (-\log p)`, each shaped like ``f``.

    Regression: the unit vectors. Classification: :math:`\Lambda = \mathrm{diag}(p) - pp^\top` has rank :math:`C - 1`. With
    :math:`u = \sqrt p`, a Householder reflection that maps :math:`e_0` to :math:`-u` takes the null direction out of the
    symmetric root and leaves :math:`C - 1` columns
    :math:`v_j = u_j \left[(e_j - p) - \tfrac{u_0}{1 + u_0} (e_0 - p)\right]`.
    """
    outputs = f.shape[-1]
    flat = f.reshape(f.shape[0], -1, outputs)
    positions = flat.shape[1]
    if likelihood is Likelihood.REGRESSION:
        columns = (_unit_column(flat, j) for j in range(outputs))
    else:
        columns = _softmax_columns(flat)
    for column in columns:
        if positions == 1:
            yield column.reshape(f.shape)
            continue
        for t in range(positions):
            alone = torch.zeros_like(flat)
            alone[:, t] = column[:, t]
            yield alone.reshape(f.shape)


def hessian_diagonal(likelihood: Likelihood, f: Tensor) -> Tensor:
    r"""Diagonal of :math:`\nabla^2_f (-\log p)`, shaped like ``f``; :math:`1 - p` of a sure example keeps its digits."""
    if likelihood is Likelihood.REGRESSION:
        return torch.ones_like(f)
    p = f.softmax(-1)
    top = p.argmax(-1, keepdim=True)
    others = p.scatter(-1, top, 0).sum(-1, keepdim=True)
    return p * (1 - p).scatter(-1, top, others)


def hessian_sum(likelihood: Likelihood, f: Tensor) -> Tensor:
    r"""Sum of :math:`\nabla^2_f (-\log p)` over examples, ``(outputs, outputs)`` for ``f`` of shape ``(batch, outputs)``.

    Classification: :math:`\mathrm{diag}(\sum_n p_n) - P^\top P`, but for the diagonal, which would lose digits.
    """
    if likelihood is Likelihood.REGRESSION:
        return len(f) * torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
    p = f.softmax(-1)
    total = -(p.T @ p)
    total.diagonal().copy_(hessian_diagonal(likelihood, f).sum(0))
    return total


def _unit_column(flat: Tensor, j: int) -> Tensor:
    column = torch.zeros_like(flat)
    column[..., j] = 1
    return column


def _softmax_columns(flat: Tensor) -> Iterator[Tensor]:
    p = flat.softmax(-1)
    u = p.sqrt()
    shared = -p
    shared[..., 0] += 1
    shared *= (u[..., :1]) / (1 + u[..., :1])
    base = -p - shared
    for j in range(1, flat.shape[-1]):
        column = base.clone()
        column[..., j] += 1
        yield column * u[..., j : j + 1]


def sampled_gradients(likelihood: Likelihood, f: Tensor, num_samples: int, seed: int, offset: int) -> Iterator[Tensor]:
    r"""Gradients under labels drawn from the model, scaled by :math:`1/\sqrt{S}`, each shaped like ``f``.

    Their outer products sum to an unbiased estimate of the Fisher (Kunstner et al., NeurIPS 2019). The draws of an
    example depend on ``seed`` and on its index in the data set only.
    """
    examples = torch.arange(offset, offset + f.shape[0], device=f.device)
    scale = num_samples**-0.5
    if likelihood is Likelihood.REGRESSION:
        draws = noise.normal(seed, examples, num_samples * f[0].numel())
        for s in draws.reshape(f.shape[0], num_samples, *f.shape[1:]).unbind(1):
            yield s.to(f.dtype) * scale
        return
    positions = f[0, ..., 0].numel()
    draws = noise.uniform(seed, examples, num_samples * positions).reshape(f.shape[0], num_samples, *f.shape[1:-1])
    probabilities = f.softmax(-1)
    cumulative = f.double().softmax(-1).cumsum(-1)
    for s in draws.unbind(1):
        label = (s[..., None] >= cumulative).sum(-1).clamp_(max=f.shape[-1] - 1)
        yield (probabilities - torch.nn.functional.one_hot(label, f.shape[-1]).to(f.dtype)) * scale
