"""The paired bootstrap against scipy's, its closed form, and what must hold whatever the scores are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from laplace.likelihoods.comparison import paired_differences
from laplace.likelihoods.scores import classification_scores, summarize_classification

N = 400


def scores(seed: int, sharp: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.distributions.Categorical(logits=logits).sample() if seed < 0 else (logits + 0.8 * torch.randn(
        N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).argmax(1)  # fmt: skip
    noise = 0.3 * torch.randn(N, 3, generator=generator.manual_seed(seed), dtype=torch.float64)
    return classification_scores((sharp * (logits + noise)).softmax(1), y)


def test_values_are_the_differences_of_the_summaries():
    one, other = scores(0), scores(1, sharp=3.0)
    found = paired_differences(one, other, draws=100)
    for name in ("nll", "ece"):
        wanted = summarize_classification(one)[name] - summarize_classification(other)[name]
        assert found[name].value == pytest.approx(wanted, abs=1e-6)


def test_the_intervals_are_those_of_scipy():
    """Of another generator, so they agree within the error of 20,000 draws."""
    one, other = scores(0), scores(1, sharp=3.0)
    found = paired_differences(one, other, draws=20_000, level=0.95)

    def ece(index):
        return (
            summarize_classification({k: v[index] for k, v in one.items()})["ece"]
            - summarize_classification({k: v[index] for k, v in other.items()})["ece"]
        )

    difference = (one["nll"] - other["nll"]).numpy()
    nll = stats.bootstrap((difference,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile",
                          rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    assert (found["nll"].low, found["nll"].high) == pytest.approx((nll.low, nll.high), abs=0.03 * (nll.high - nll.low))
    wanted = stats.bootstrap((np.arange(N),), ece, n_resamples=1_000, confidence_level=0.9, method="percentile",
                             vectorized=False, rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    width = wanted.high - wanted.low
    assert (found["ece"].low, found["ece"].high) == pytest.approx((wanted.low, wanted.high), abs=0.1 * width)


def test_the_interval_of_the_nll_is_that_of_the_normal_law_where_examples_are_many():
    generator = torch.Generator().manual_seed(0)
    one, other = ({"nll": torch.randn(5_000, generator=generator, dtype=torch.float64)} for _ in range(2))
    found = paired_differences(one, other, draws=10_000)["nll"]
    error = float((one["nll"] - other["nll"]).std()) / 5_000**0.5
    assert (found.high - found.value, found.value - found.low) == pytest.approx((1.645 * error,) * 2, rel=0.05)


def test_the_same_predictions_do_not_differ_and_the_draws_are_those_of_the_seed():
    one = scores(0)
    for difference in paired_differences(one, one).values():
        assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    two = scores(1)
    assert (
        paired_differences(one, two, seed=3)
        == paired_differences(one, two, seed=3)
        != paired_differences(one, two, seed=4)
    )
    swapped = paired_differences(two, one, seed=3)
    for name, difference in paired_differences(one, two, seed=3).items():
        assert (swapped[name].low, swapped[name].high) == pytest.approx((-difference.high, -difference.low))


def test_scores_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="of 3 and 2 examples"):
        paired_differences({"nll": torch.ones(3)}, {"nll": torch.ones(2)})
    with pytest.raises(ValueError, match="of 0 and 0 examples"):
        paired_differences({"nll": torch.ones(0)}, {"nll": torch.ones(0)})
