"""Diagonal SWAG: variances of the weights along a short run of SGD at a constant step size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from laplace.data.batches import batches
from laplace.linalg.dense import parameter_vector
from laplace.linalg.precision import without_kept_casts


def fit_diagonal_swag_var(
    model: nn.Module,
    train_loader: Iterable,
    criterion: Callable[[Tensor, Tensor], Tensor],
    n_snapshots_total: int = 40,
    snapshot_freq: int = 1,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    min_var: float = 1e-30,
    dict_key_y: str = "labels",
) -> Tensor:
    r"""Variance of every weight over snapshots of SGD, started at the given weights.

    Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (NeurIPS 2019). The training runs on a
    copy: the model is left as it is. Variances are accumulated in float64 by Welford's recurrence, because the textbook
    :math:`\overline{\theta^2} - \bar\theta^2` loses all digits of small variances in float32.

    Args:
        model: Trained network.
        train_loader: Batches ``(x, y)``, or dict-like batches.
        criterion: Mean loss of a batch, from outputs and targets.
        n_snapshots_total: Number of snapshots.
        snapshot_freq: Epochs between two snapshots.
        lr: Step size of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        min_var: Variances are at least this.
        dict_key_y: Key of the targets in dict-like batches.

    Returns:
        Variances of the parameters with ``requires_grad``, ``(parameters,)``.

    Raises:
        ValueError: If there are no snapshots to take, or the weights become NaN or Inf.
    """
    if n_snapshots_total < 1 or snapshot_freq < 1:
        raise ValueError(
            f"n_snapshots_total={n_snapshots_total} and snapshot_freq={snapshot_freq} must be at least 1 each."
        )
    model = copy.deepcopy(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    model.train()
    mean = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64, device=params[0].device)
    squares = torch.zeros_like(mean)
    for snapshot in range(1, n_snapshots_total + 1):
        for _ in range(snapshot_freq):
            _train_epoch(model, train_loader, criterion, optimizer, dict_key_y)
        theta = parameter_vector(params).detach().double()
        delta = theta - mean
        mean += delta / snapshot
        squares += delta * (theta - mean)
    if not bool(torch.isfinite(squares).all()):
        raise ValueError(f"The weights became NaN or Inf along the run of SGD; lower lr={lr}.")
    return (squares / n_snapshots_total).clamp(min=min_var).to(params[0].dtype)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether ``module`` keeps running statistics of batches."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@without_kept_casts()
def _train_epoch(model: nn.Module, loader: Iterable, criterion, optimizer, dict_key_y: str) -> None:
    device = next(model.parameters()).device
    for x, y in batches(loader, device, dict_key_y):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
