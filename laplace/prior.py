"""The Gaussian prior's precision: one value, one per parameter tensor or one per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace.enums import PriorStructure, parse


def as_value(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, or numbers, as a tensor.

    Raises:
        ValueError: If it is none; names the argument.
    """
    try:
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={value!r} must be a number, or a tensor or list of numbers.") from error


def spread(prior_precision: Tensor, sizes: Sequence[int]) -> Tensor:
    """A scalar, layerwise or diagonal prior precision as one value per parameter, for tensors of these sizes.

    Raises:
        ValueError: On another number of values.
    """
    if len(prior_precision) == 1:
        return prior_precision.expand(sum(sizes))
    if len(prior_precision) == sum(sizes):
        return prior_precision
    if len(prior_precision) != len(sizes):
        raise ValueError(f"prior_prec has {len(prior_precision)} values; valid are 1, {len(sizes)} or {sum(sizes)}.")
    return prior_precision.repeat_interleave(torch.tensor(sizes, device=prior_precision.device))


def weighted_sum(prior_precision: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    r""":math:`\sum_i p_i v_i` in the type of the values, without the :func:`spread` prior precision.

    Args:
        prior_precision: Scalar, layerwise or diagonal, for tensors of these sizes.
        values: One per parameter.
        sizes: Number of entries of every tensor.
    """
    prior_precision = prior_precision.to(values.dtype)
    if len(prior_precision) == 1:
        return prior_precision[0] * values.sum()
    if len(prior_precision) == len(values):
        return (prior_precision * values).sum()
    return (prior_precision * torch.stack([part.sum() for part in values.split(list(sizes))])).sum()


def log_det(prior_precision: Tensor, sizes: Sequence[int]) -> Tensor:
    """Log determinant in float64 of a scalar, layerwise or diagonal prior precision for tensors of these sizes."""
    logs = prior_precision.double().log()
    if len(logs) == sum(sizes):
        return logs.sum()
    counts = [sum(sizes)] if len(logs) == 1 else sizes
    return (logs * torch.tensor(counts, device=logs.device)).sum()


def parameters_per_layer(model: nn.Module) -> list[int]:
    """Number of entries of every parameter tensor of ``model`` with ``requires_grad``."""
    return [p.numel() for p in model.parameters() if p.requires_grad]


def expand_prior_precision(prior_prec: Tensor, model: nn.Module) -> Tensor:
    """One prior precision per parameter.

    Args:
        prior_prec: A scalar, one value per parameter tensor, or one per parameter.
        model: The network.

    Returns:
        Precisions ``(parameters,)``.

    Raises:
        ValueError: On another number of values.
    """
    return spread(prior_prec.reshape(-1), parameters_per_layer(model))


def fix_prior_prec_structure(
    prior_prec_init: float | Tensor,
    prior_structure: PriorStructure | str,
    n_layers: int,
    n_params: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A prior precision of the given structure that is ``prior_prec_init`` everywhere.

    Args:
        prior_prec_init: The one value.
        prior_structure: ``'scalar'``, ``'layerwise'`` or ``'diag'``.
        n_layers: Number of parameter tensors.
        n_params: Number of parameters.
        device: Where to put it.
        dtype: Its type.

    Raises:
        ValueError: On another structure.
    """
    structure = parse(PriorStructure, prior_structure, "prior_structure")
    sizes = {PriorStructure.SCALAR: 1, PriorStructure.LAYERWISE: n_layers, PriorStructure.DIAG: n_params}
    return torch.as_tensor(prior_prec_init, device=device, dtype=dtype).reshape(1).repeat(sizes[structure])
