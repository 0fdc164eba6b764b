"""What accuracy and NLL will be once the labels are there, estimated from confidences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def estimates(reference: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, float]:
    r"""Estimate figures on examples without labels from how predictions and labels went together on a reference.

    `accuracy_atc`: average thresholded confidence, the share of fresh examples whose confidence is above the threshold that on
    the reference gives the accuracy there (Garg et al., "Leveraging unlabeled data to predict out-of-distribution performance",
    ICLR 2022). `accuracy_doc`: the accuracy on the reference plus the difference of the average confidences (Guillory et al.,
    "Predicting with confidence on unseen distributions", ICCV 2021). `nll_doc`: in the same way the NLL on the reference plus
    the difference of the average entropies, which is what the NLL would be if the predictions were calibrated. All of them
    assume that confidence and correctness go together as they did; a model that is wrong and sure of it is not found so.

    Args:
        reference: `confidence`, `correct`, `nll` and `entropy` per example.
        fresh: `confidence` and `entropy` per example.
    """
    accuracy = float(reference["correct"].double().mean())
    confidence, now = reference["confidence"].double().sort().values, fresh["confidence"].double()
    wrong = round(len(confidence) * (1 - accuracy))  # so many of the reference lie below the threshold
    below = -torch.inf if wrong == 0 else float(confidence[wrong - 1])
    shift = float(fresh["entropy"].double().mean() - reference["entropy"].double().mean())
    doc = accuracy + float(now.mean() - confidence.mean())
    return {
        "accuracy_atc": float((now > below).double().mean()),
        "accuracy_doc": min(max(doc, 0.0), 1.0),
        "nll_doc": float(reference["nll"].double().mean()) + shift,
    }
