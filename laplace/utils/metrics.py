"""Scores of predictions, under their customary import path."""

from typing import Any

from laplace.likelihoods.scores import (
    classification_scores,
    regression_scores,
    summarize_classification,
    summarize_regression,
)

__all__ = [
    "RunningNLLMetric",  # noqa: F822 (imported on first use)
    "classification_scores",
    "regression_scores",
    "summarize_classification",
    "summarize_regression",
]


def __getattr__(name: str) -> Any:
    """Import torchmetrics only for who wants a metric: beside a broken torchvision it cannot be imported."""
    if name != "RunningNLLMetric":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from laplace.likelihoods.running import RunningNLLMetric

    return RunningNLLMetric
