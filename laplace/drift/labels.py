"""How often each class comes: counted where there are labels, estimated from predictions where there are none yet."""

from __future__ import annotations

import torch
from torch import Tensor


def proportions(labels: Tensor, classes: int) -> Tensor:
    """Return the share of each class among labels, ``(classes,)``."""
    return torch.bincount(labels.long(), minlength=classes).double() / len(labels)


def estimated_proportions(labels: Tensor, predicted: Tensor, fresh: Tensor, classes: int) -> Tensor:
    r"""Estimate the shares of the classes among examples without labels, if only these shares have changed.

    Black-box shift estimation: with :math:`C_{ij} = P(\hat y = i, y = j)` on the reference and the shares :math:`\mu` of what
    is predicted now, :math:`C w = \mu` gives the ratios :math:`w_j = q(y = j) / p(y = j)`. Negative ones become 0, and the
    shares are scaled to add up to 1 (Lipton, Wang and Smola, "Detecting and correcting for label shift with black box
    predictors", ICML 2018). Where the confusions do not determine the ratios, those of least norm around 1 are taken.

    Args:
        labels: Of the reference, ``(examples,)``.
        predicted: Classes predicted for the reference.
        fresh: Classes predicted for the examples without labels.
        classes: Their number.
    """
    joint = torch.zeros(classes, classes, dtype=torch.float64)
    joint.index_put_((predicted.long(), labels.long()), torch.ones((), dtype=torch.float64), accumulate=True)
    joint /= len(labels)
    excess = proportions(fresh, classes) - joint.sum(1)
    ratios = 1 + torch.linalg.lstsq(joint, excess[:, None], driver="gelsd").solution[:, 0]
    shares = ratios.clamp(min=0) * proportions(labels, classes)
    return shares / shares.sum() if shares.sum() > 0 else proportions(fresh, classes)
