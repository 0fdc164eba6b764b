"""Scores against formulas written out example by example."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from laplace.likelihoods.scores import auroc as auroc_of
from laplace.likelihoods.scores import calibration_error as calibration_error_of
from laplace.utils.metrics import (
    classification_scores,
    regression_scores,
    summarize_classification,
    summarize_regression,
)


def example(n=300, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(1), torch.randint(classes, (n,), generator=generator)


def calibration_error(confidence, correct, bins=15):
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins]
        if inside:
            gap = np.mean([confidence[i] for i in inside]) - np.mean([correct[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


def auroc(inside, outside):
    """Probability that a random inside example has more confidence than a random outside one; ties count half."""
    wins = sum((i > o) + 0.5 * (i == o) for i in inside for o in outside)
    return wins / (len(inside) * len(outside))


def test_classification_scores():
    probs, y = example()
    scores = classification_scores(probs, y)
    for i, (p, label) in enumerate(zip(probs.tolist(), y.tolist(), strict=True)):
        assert scores["confidence"][i].item() == max(p)
        assert scores["correct"][i].item() == float(p.index(max(p)) == label)
        assert scores["nll"][i].item() == pytest.approx(-math.log(p[label]))
        brier = sum((q - (k == label)) ** 2 for k, q in enumerate(p))
        assert scores["brier"][i].item() == pytest.approx(brier)
    assert {v.dtype for v in scores.values()} == {torch.float64}
    assert {v.shape for v in scores.values()} == {(300,)}


def test_classification_scores_of_positions_and_of_zero_probability():
    probs, y = example()
    grid = classification_scores(probs.reshape(100, 3, 4), y.reshape(100, 3))
    assert torch.equal(grid["nll"], classification_scores(probs, y)["nll"])
    certain = classification_scores(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert math.isfinite(certain["nll"].item())
    assert certain["nll"].item() > 700


def test_classification_summary():
    probs, y = example()
    ood, _ = example(200, seed=1)
    scores = classification_scores(probs, y)
    outside = ood.max(1).values * 0.9
    outside[:50] = scores["confidence"][:50]  # ties
    summary = summarize_classification(scores, {"noise": outside, "other": ood.max(1).values})
    labels = probs.argmax(1)
    assert summary["accuracy"] == pytest.approx(float((labels == y).double().mean()))
    assert summary["nll"] == pytest.approx(float(-probs[torch.arange(300), y].log().mean()))
    assert summary["brier"] == pytest.approx(float(scores["brier"].mean()))
    expected = calibration_error(scores["confidence"].tolist(), scores["correct"].tolist())
    assert summary["ece"] == pytest.approx(expected, abs=1e-6)
    assert summary["ood_auroc/noise"] == pytest.approx(auroc(scores["confidence"].tolist(), outside.tolist()), abs=1e-6)
    assert set(summary) == {"accuracy", "nll", "brier", "ece", "ood_auroc/noise", "ood_auroc/other"}
    assert all(isinstance(value, float) for value in summary.values())
    assert "ood_auroc/noise" not in summarize_classification(scores)


def test_perfect_and_hopeless_separation():
    probs, y = example()
    scores = classification_scores(probs, y)
    low = torch.full((10,), 0.25, dtype=torch.float64)
    assert summarize_classification(scores, {"x": low * 0.9})["ood_auroc/x"] == pytest.approx(1.0)
    assert summarize_classification(scores, {"x": low * 4})["ood_auroc/x"] == pytest.approx(0.0)


def test_calibrated_confidence_has_a_small_error_and_overconfidence_a_large_one():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(20000, generator=generator, dtype=torch.float64)
    correct = (torch.rand(20000, generator=generator, dtype=torch.float64) < confidence).double()
    zeros = torch.zeros_like(confidence)
    calibrated = {"confidence": confidence, "correct": correct, "nll": zeros, "brier": zeros}
    assert summarize_classification(calibrated)["ece"] < 0.02
    assert summarize_classification({**calibrated, "correct": zeros})["ece"] == pytest.approx(
        float(confidence.mean()), abs=1e-6
    )


def test_regression_scores():
    generator = torch.Generator().manual_seed(0)
    mean, y = (torch.randn(50, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    variance = torch.rand(50, 2, generator=generator, dtype=torch.float64) + 0.1
    scores = regression_scores(mean, variance, y)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    assert torch.allclose(scores["nll"], -normal.log_prob(y).mean(1))
    assert torch.allclose(scores["squared_error"], (mean - y).square().mean(1))
    inside = (normal.icdf(torch.tensor(0.05)) <= y) & (y <= normal.icdf(torch.tensor(0.95)))
    assert torch.equal(scores["covered_90"], inside.double().mean(1))
    summary = summarize_regression(scores)
    assert summary["rmse"] == pytest.approx(float((mean - y).square().mean().sqrt()))
    assert summary["nll"] == pytest.approx(float(-normal.log_prob(y).mean()))
    assert summary["coverage_90"] == pytest.approx(float(inside.double().mean()))


def test_gaussian_targets_are_covered_nine_times_in_ten():
    """20000 trials: standard deviation 0.0021, so 0.009 is more than four of them."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    y = mean + 0.7 * torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    scores = regression_scores(mean, torch.full_like(mean, 0.49), y)
    assert summarize_regression(scores)["coverage_90"] == pytest.approx(0.9, abs=0.009)


def test_scores_of_shards_concatenate():
    probs, y = example()
    whole = classification_scores(probs, y)
    shards = [classification_scores(probs[a:b], y[a:b]) for a, b in ((0, 100), (100, 101), (101, 300))]
    joined = {name: torch.cat([s[name] for s in shards]) for name in whole}
    assert summarize_classification(joined) == summarize_classification(whole)


def test_summaries_are_those_of_torchmetrics_and_do_not_import_it():
    """Also where confidences are tied, as of a saturated network; importing it takes seconds of every job."""
    from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

    generator = torch.Generator().manual_seed(3)
    for places in (8, 2):
        inside, outside = (
            torch.rand(n, generator=generator, dtype=torch.float64).round(decimals=places) for n in (500, 70)
        )
        correct = (torch.rand(500, generator=generator) < inside).double()
        labels = torch.cat([torch.ones(500), torch.zeros(70)]).long()
        wanted = binary_auroc(torch.cat([inside, outside]), labels).item()
        assert auroc_of(inside, outside) == pytest.approx(wanted, abs=1e-6)
        error = binary_calibration_error(inside, correct.long(), n_bins=15).item()
        assert calibration_error_of(inside, correct, 15) == pytest.approx(error, abs=1e-6)


def test_a_summary_imports_no_further_package():
    code = """
import sys, torch
from laplace.likelihoods.scores import summarize_classification
scores = {name: torch.rand(9, dtype=torch.float64) for name in ("correct", "nll", "brier", "confidence")}
summarize_classification(scores, {"x": torch.rand(5, dtype=torch.float64)})
assert "torchmetrics" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
