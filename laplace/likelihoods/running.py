"""Metrics that run along with a loop over batches, for torchmetrics' interface."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RunningNLLMetric(Metric):
    """Mean negative log likelihood of class probabilities, in nats.

    Sums are kept in float64 and belong to one use: call ``reset()`` before another, as :func:`laplace.utils.validate`
    and the grid search do.

    Args:
        ignore_index: Targets of this value are left out.

    Example:
        >>> import torch
        >>> from laplace.utils import RunningNLLMetric
        >>> metric = RunningNLLMetric()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> round(metric.compute().item(), 4)
        0.4904
    """

    higher_is_better = False
    is_differentiable = False

    def __init__(self, ignore_index: int = -100):
        """See the class."""
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("nll_sum", default=torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("n_valid_labels", default=torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, probs: Tensor, targets: Tensor) -> None:
        """Add one batch.

        Args:
            probs: Class probabilities ``(batch, …, classes)``.
            targets: Labels ``(batch, …)``.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if probs.shape[:-1] != targets.shape:
            raise ValueError(
                f"Targets of shape {tuple(targets.shape)} do not match probabilities of shape {tuple(probs.shape)}; "
                f"expected {tuple(probs.shape[:-1])}."
            )
        valid = targets != self.ignore_index
        picked = probs[valid].double().gather(-1, targets[valid].long()[:, None])
        self.nll_sum -= picked.clamp(min=torch.finfo(torch.float64).tiny).log().sum()
        self.n_valid_labels += valid.sum()

    def compute(self) -> Tensor:
        """Mean over the labels since the last ``reset()``; NaN if there are none."""
        return self.nll_sum / self.n_valid_labels
