"""Whether data are still what they were: the sequential test against its definition and its promise, and every estimate."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from torch import nn

from laplace.drift import exchangeability
from laplace.drift.changes import changes
from laplace.drift.confidence import estimates
from laplace.drift.features import Distance, LastInputs, fit_distance, project
from laplace.drift.labels import estimated_proportions, proportions
from laplace.drift.spectra import relative_distance, spectrum
from laplace.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, WeightedCategorical
from laplace.likelihoods.scores import classification_scores, summarize_classification

ALPHA = 0.05


def normal(n, seed, shift=0.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


# ------------------------------------------------------------------ the sequential test


def test_p_values_are_smoothed_ranks_among_all_earlier_scores():
    generator = torch.Generator().manual_seed(0)
    past, new = (torch.randint(4, (n,), generator=generator) for n in (30, 50))
    u = torch.rand(50, generator=generator, dtype=torch.float64)
    found = exchangeability.conformal_p_values(torch.bincount(past, minlength=4), new, u)
    earlier = past.tolist()
    for value, uniform, p in zip(new.tolist(), u.tolist(), found.tolist(), strict=True):
        earlier.append(value)
        above, same = sum(x > value for x in earlier), sum(x == value for x in earlier)
        assert p == pytest.approx((above + uniform * same) / len(earlier), abs=1e-14)


def test_the_bet_is_the_product_of_what_the_histogram_predicted():
    p = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2
    capital = 0.0
    for prior in (1.0, 10.0, 100.0, 1000.0):
        counts, one = [0] * 10, 1.0
        for value in p.tolist():
            which = int(value * 10)
            one *= 10 * (counts[which] + prior) / (sum(counts) + 10 * prior)
            counts[which] += 1
        capital += one / 4
    assert exchangeability.log_bet(p) == pytest.approx(math.log(capital), rel=1e-12)


def test_a_bet_on_uniform_numbers_wins_nothing_on_average():
    middles = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    every = [math.exp(exchangeability.log_bet(torch.stack(p))) for p in itertools.product(middles, repeat=3)]
    assert np.mean(every) == pytest.approx(1.0, rel=1e-12)


def test_the_evidence_is_the_mixture_over_all_beginnings(monkeypatch):
    bets = [1.5, 0.4, 3.0, 0.9]
    given = iter(bets)
    monkeypatch.setattr(exchangeability, "log_bet", lambda p: math.log(next(given)))
    stream = exchangeability.begin(normal(40, 0))
    for number in range(1, 5):
        stream = exchangeability.look(stream, normal(5, number))
        started = sum(math.prod(bets[s - 1 : number]) / (s * (s + 1)) for s in range(1, number + 1))
        assert math.exp(stream.log_evidence) == pytest.approx(started + 1 / (number + 1), rel=1e-12)


def schedule(seed, looks, shift_from=None, reference=100, each=60):
    """Return the numbers of the looks at which the evidence reaches 1 / α."""
    stream, alarms = exchangeability.begin(normal(reference, 10_000 * seed)), []
    for number in range(1, looks + 1):
        shift = 1.0 if shift_from is not None and number >= shift_from else 0.0
        stream = exchangeability.look(stream, normal(each, 10_000 * seed + number, shift), seed)
        if stream.log_evidence >= exchangeability.threshold(ALPHA):
            alarms.append(number)
    return alarms


def test_over_many_looks_together_false_alarms_keep_to_their_rate():
    """The bound is for ever; a p-value of 5 % at each of 30 looks would sound in 79 % of the schedules."""
    schedules = 200
    sounded = sum(bool(schedule(seed, 30)) for seed in range(schedules))
    assert sounded <= ALPHA * schedules + 2 * math.sqrt(schedules * ALPHA * (1 - ALPHA))


def test_a_change_is_noticed_when_it_comes_and_not_before():
    for seed in range(10):
        assert schedule(seed, 20, shift_from=15)[:1] == [15]


def test_rates_of_all_references_and_streams_add_up_to_the_whole():
    shares = [3 * exchangeability.share(ALPHA, reference, 3) for reference in range(1, 5000)]
    assert 0.999 * ALPHA < sum(shares) < ALPHA


def test_a_stream_is_kept_as_plain_values_and_goes_on_as_if_it_had_not_been():
    stream = exchangeability.look(exchangeability.begin(normal(50, 1)), normal(20, 2))
    again = exchangeability.Stream.from_plain(stream.to_plain())
    assert again == stream
    assert exchangeability.look(again, normal(20, 3)) == exchangeability.look(stream, normal(20, 3))


def test_the_order_of_the_examples_does_not_matter():
    """Data sets are often sorted, by class or by time; that is no drift."""
    for seed in range(5):
        stream = exchangeability.begin(normal(400, 100 * seed).sort().values)
        for number in range(1, 6):
            stream = exchangeability.look(stream, normal(400, 100 * seed + number).sort().values)
        assert stream.log_evidence < 1


def test_ties_and_constants_do_no_harm():
    stream = exchangeability.begin(torch.ones(10))
    for _ in range(5):
        stream = exchangeability.look(stream, torch.ones(30))
    assert stream.log_evidence < 2
    assert exchangeability.look(stream, torch.zeros(30)).log_evidence > 0 or len(stream.edges) == 1


@pytest.mark.parametrize("scores, message", [([1.0], "has 1 example"), ([1.0, float("nan"), 2.0], "example 1 of the reference is not finite")])  # fmt: skip
def test_a_reference_that_says_nothing_is_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        exchangeability.begin(torch.tensor(scores))


def test_a_look_at_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        exchangeability.look(exchangeability.begin(normal(10, 0)), torch.zeros(0))


# ------------------------------------------------------------------ the inputs of the last layer


def test_the_distance_is_that_of_mahalanobis_to_the_nearest_mean():
    x, classes = normal(60, 1).reshape(20, 3), torch.arange(20) % 2
    found = fit_distance(x, classes)
    means = [x[classes == c].mean(0).numpy() for c in (0, 1)]
    centred = np.concatenate([x[classes == c].numpy() - means[c] for c in (0, 1)])
    covariance = centred.T @ centred / 20
    covariance += 0.1 * np.diag(covariance).mean() * np.eye(3)
    inverse = np.linalg.inv(covariance)
    new = normal(15, 2).reshape(5, 3)
    for row, distance in zip(new.numpy(), found(new).tolist(), strict=True):
        assert distance == pytest.approx(min(mahalanobis(row, mean, inverse) ** 2 for mean in means), rel=1e-10)
    assert torch.equal(Distance.from_plain(found.to_plain())(new), found(new))


def test_a_projection_is_linear_the_same_every_time_and_about_keeps_distances():
    x = normal(40 * 500, 3).reshape(40, 500)
    once = project(x)
    assert once.shape == (40, 32) and torch.equal(once, project(x)) and torch.equal(project(x[:, :7]), x[:, :7])
    torch.testing.assert_close(project(2 * x[:1] + x[1:2]), 2 * once[:1] + once[1:2])
    ratio = torch.pdist(once).square() / torch.pdist(x).square()
    assert 0.9 < float(ratio.mean()) < 1.1


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_what_the_last_layer_is_given_is_kept_and_the_model_left_as_it_is(shape):
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 2)
    model, x = nn.Sequential(body, head), torch.randn(shape)
    with LastInputs(model) as last:
        model(x)
    wanted = body(x).double()
    torch.testing.assert_close(last.projected(), wanted if len(shape) == 2 else wanted.mean(1))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with LastInputs(nn.Tanh()) as none:
        pass
    assert none.projected() is None


# ------------------------------------------------------------------ figures, labels, confidences


def scores_of(n, seed, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    found = classification_scores(logits.softmax(-1), y)
    return {**found, "entropy": torch.distributions.Categorical(logits=logits).entropy()}


def test_changes_are_those_of_the_summaries_with_intervals_of_two_samples():
    one, two = scores_of(400, 0), scores_of(300, 1, 1.0)
    found = changes(one, two)
    for name, before, now in ((n, summarize_classification(one)[n], summarize_classification(two)[n]) for n in found):
        assert (found[name].before, found[name].now) == (pytest.approx(before, abs=1e-6), pytest.approx(now, abs=1e-6))
        assert found[name].low < found[name].change < found[name].high or name == "ece"
    for name, of in (("nll", "nll"), ("accuracy", "correct")):
        error = math.sqrt(one[of].var() / 400 + two[of].var() / 300)
        assert found[name].high - found[name].low == pytest.approx(2 * 1.645 * error, rel=0.1)
    assert set(changes({"nll": one["nll"]}, {"nll": two["nll"]})) == {"nll"}
    with pytest.raises(ValueError, match="nothing to compare"):
        changes({"nll": torch.zeros(0)}, {"nll": one["nll"]})


def test_label_shift_is_found_from_predictions_alone():
    """Exactly, where the rates of confusion are exactly those of the reference."""
    confusion = torch.tensor([[8, 1, 1], [2, 6, 2], [0, 3, 7]])  # label × predicted
    labels = torch.arange(3).repeat_interleave(10)
    predicted = torch.cat([torch.arange(3).repeat_interleave(row) for row in confusion])
    now = torch.tensor([1, 2, 7])
    fresh = torch.cat([torch.arange(3).repeat_interleave(row * k) for row, k in zip(confusion, now, strict=True)])
    found = estimated_proportions(labels, predicted, fresh, 3)
    torch.testing.assert_close(found, now.double() / 10)
    torch.testing.assert_close(estimated_proportions(labels, predicted, predicted, 3), proportions(labels, 3))
    always = torch.zeros(30)  # a model that says one thing says nothing of shares
    torch.testing.assert_close(estimated_proportions(labels, always, always, 3), proportions(labels, 3))


def test_estimates_without_labels_are_right_while_confidence_means_the_same():
    one, two = scores_of(20_000, 2), scores_of(20_000, 3, 1.0)
    same = estimates(one, one)
    for name in ("accuracy_atc", "accuracy_doc"):
        assert same[name] == pytest.approx(float(one["correct"].mean()))
    assert same["nll_doc"] == pytest.approx(float(one["nll"].mean()))
    found = estimates(one, {name: two[name] for name in ("confidence", "entropy")})
    assert found["accuracy_doc"] == pytest.approx(float(two["correct"].mean()), abs=0.02)  # these are calibrated
    assert found["nll_doc"] == pytest.approx(float(two["nll"].mean()), abs=0.02)
    by_hand = {"confidence": [0.9, 0.8, 0.7, 0.6], "correct": [1.0, 1, 1, 0], "nll": [0.0] * 4, "entropy": [0.0] * 4}
    tensors = {name: torch.tensor(values) for name, values in by_hand.items()}
    fresh = {"confidence": torch.tensor([0.95, 0.5, 0.55, 0.65]), "entropy": torch.zeros(4)}
    assert estimates(tensors, fresh)["accuracy_atc"] == 0.5  # above 0.6


@pytest.mark.parametrize("symmetric", [True, False])
def test_spectra_move_no_more_than_the_matrices(symmetric):
    for seed in range(20):
        a, b = (normal(36, 100 * seed + k).reshape(6, 6) for k in (0, 1))
        a, b = (a @ a.T, b @ b.T) if symmetric else (a, b)
        one, other = (spectrum(m, 3, symmetric=symmetric) for m in (a, b))
        wanted = np.linalg.eigvalsh(a.numpy() / 3) if symmetric else np.sort(a.numpy().ravel() / 3)
        np.testing.assert_allclose(one.numpy(), wanted, atol=1e-12)
        found = relative_distance(one, other)
        assert 0 < found <= float((a - b).norm() / b.norm()) + 1e-12
        assert relative_distance(one, one) == 0.0
    assert relative_distance(one, 0 * one) == float("inf") and relative_distance(0 * one, 0 * one) == 0.0


def test_what_is_watched_of_predictions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    plain = Categorical()
    found = plain.monitored(plain.at(logits), y)
    torch.testing.assert_close(found["entropy"], torch.distributions.Categorical(logits=logits).entropy())
    assert found["label"].tolist() == y.tolist() and found["predicted"].tolist() == logits.argmax(1).tolist()
    assert "label" not in plain.monitored(plain.at(logits))
    some = WeightedCategorical(ignore_index=2).monitored(plain.at(logits), y)
    torch.testing.assert_close(some["entropy"], found["entropy"][y != 2])
    soft = WeightedCategorical(soft_targets=True).monitored(plain.at(logits), torch.eye(3)[y])
    assert soft["label"].tolist() == y.tolist()
    yes = Bernoulli().monitored(Bernoulli().at(logits))
    torch.testing.assert_close(yes["entropy"], torch.distributions.Bernoulli(logits=logits).entropy().flatten())
    variance = logits.exp()
    wanted = torch.distributions.Normal(logits, (variance + 0.25).sqrt()).entropy().mean(1)
    torch.testing.assert_close(Gaussian().monitored((logits, variance), None, 0.5)["entropy"], wanted)
    torch.testing.assert_close(Gaussian().monitored((logits, torch.diag_embed(variance)), None, 0.5)["entropy"], wanted)
    torch.testing.assert_close(HeteroscedasticGaussian().monitored((logits, variance + 0.25))["entropy"], wanted)
