"""Counter-based noise: a pure function of its coordinates, uniform and independent.

Statistics of fixed seeds are numbers, so that these tests cannot flicker; the bounds are four standard deviations.
"""

from __future__ import annotations

import pytest
import torch

from laplace import likelihoods
from laplace.likelihoods import likelihood_of
from laplace.noise import normal, uniform
from laplace.utils.enums import Likelihood

N, DRAWS = 4000, 10


def draws(seed=0, n=N):
    return uniform(seed, torch.arange(n), DRAWS)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_row_depends_on_seed_and_example_alone():
    whole = draws()
    assert torch.equal(uniform(0, torch.tensor([17, 3]), DRAWS), whole[[17, 3]])
    assert torch.equal(uniform(0, torch.arange(5), 3), whole[:5, :3])
    assert not torch.equal(draws(1), whole)
    assert torch.equal(uniform(0, torch.arange(7, 9, dtype=torch.int32), DRAWS), whole[7:9])


def test_numbers_are_those_of_splitmix64():
    """The generator written in unbounded integers; fixes the bits, which stored partial sums depend on."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def number(seed, example, draw):
        row = mix((example * golden + mix((seed + golden) & mask)) & mask)
        return ((mix((row + (draw + 1) * golden) & mask) >> 12) + 0.5) / 2**52

    for seed in (0, 5, 2**40):
        for example in (0, 1, 999, 10**9):
            expected = [number(seed, example, draw) for draw in range(4)]
            assert uniform(seed, torch.tensor([example]), 4).tolist() == [expected]


def test_open_interval_and_float64():
    values = draws()
    assert values.dtype == torch.float64
    assert 0 < float(values.min()) < float(values.max()) < 1
    assert torch.isfinite(normal(0, torch.arange(N), DRAWS)).all()
    assert values.unique().numel() == values.numel()


def test_uniform_by_chi_square():
    """Each of 100 bins expects 400; chi-square with 99 degrees of freedom has mean 99 and standard deviation 14.1."""
    for seed in (0, 1, 12345, -7, 2**61):
        counts = torch.histc(draws(seed), 100, 0, 1)
        chi = float(((counts - 400) ** 2 / 400).sum())
        assert 99 - 4 * 14.1 < chi < 99 + 4 * 14.1


def test_uniform_by_kolmogorov_smirnov():
    """sqrt(n) times the largest deviation of the distribution function exceeds 2 with probability 0.0007."""
    for values in (draws(), draws()[:, 0], draws()[5], draws(9, 400)):
        ordered = values.flatten().sort().values
        n = len(ordered)
        steps = torch.arange(n, dtype=torch.float64)
        deviation = torch.maximum((ordered - steps / n).abs().max(), (ordered - (steps + 1) / n).abs().max())
        assert n**0.5 * float(deviation) < 2


def test_neighbours_are_uncorrelated():
    """A correlation of n independent pairs has standard deviation 1/sqrt(n)."""
    values = draws()
    bound = 4 / (N * DRAWS - N) ** 0.5
    for lag in (1, 2, 64, 1000):
        assert abs(correlation(values[lag:], values[:-lag])) < 4 / ((N - lag) * DRAWS) ** 0.5, f"examples, lag {lag}"
    for lag in (1, 2, 5):
        assert abs(correlation(values[:, lag:], values[:, :-lag])) < bound * 1.5, f"draws, lag {lag}"
    for other in (1, 2, 1 << 20):
        assert abs(correlation(values, draws(other))) < bound, f"seed {other}"
    assert abs(correlation(values[1:, :-1], values[:-1, 1:])) < bound  # along the diagonal


def test_pairs_fill_the_square():
    """Joint chi-square over 10 x 10 cells of (example, next example) and of (draw, next draw)."""
    values = draws()
    for a, b in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])):
        cells = (a.flatten() * 10).long() * 10 + (b.flatten() * 10).long()
        counts = torch.bincount(cells, minlength=100).double()
        expected = counts.sum() / 100
        assert float(((counts - expected) ** 2 / expected).sum()) < 99 + 4 * 14.1


def test_normal_moments():
    """Mean, variance and fourth moment of n normals: standard deviations 1/sqrt(n), sqrt(2/n), sqrt(96/n)."""
    values = normal(3, torch.arange(N), DRAWS)
    n = values.numel()
    assert abs(float(values.mean())) < 4 / n**0.5
    assert abs(float(values.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float(values.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5
    assert torch.allclose(torch.special.ndtr(values), uniform(3, torch.arange(N), DRAWS))


@pytest.mark.parametrize("what", ["example", "seed"])
def test_every_bit_of_the_coordinates_reaches_every_bit_of_the_number(what):
    """Avalanche: one flipped input bit flips each output bit in half of n cases, to 6 standard deviations 1/2sqrt(n).

    There are about 1500 pairs of bits; the most extreme of so many independent ones lies below 4.5.
    """
    n = 4000
    examples = torch.arange(n) * 1_000_003

    def bits(seed, indices):
        return (uniform(seed, indices, 1)[:, 0] * (1 << 52)).long()

    for position in range(30):
        changed = bits(0, examples ^ (1 << position)) if what == "example" else bits(1 << position, examples)
        difference = bits(0, examples) ^ changed
        flips = torch.stack([((difference >> k) & 1).double().mean() for k in range(52)])
        assert float((flips - 0.5).abs().max()) < 6 * 0.5 / n**0.5, position


def test_sampled_labels_follow_the_model():
    """Frequencies of n draws have standard deviation sqrt(p (1 - p) / n); gradients' second moment is the Hessian."""
    n, p = 40000, torch.tensor([0.05, 0.25, 0.1, 0.6], dtype=torch.float64)
    f = p.log().expand(n, 4)
    for offset in (0, 10**6):
        (gradients,) = likelihood_of(Likelihood.CLASSIFICATION).sampled_gradients(f, None, 1, seed=0, offset=offset)
        frequencies = (p - gradients).round().mean(0)
        assert float(((frequencies - p).abs() / (p * (1 - p) / n).sqrt()).max()) < 4
        assert torch.allclose(gradients.T @ gradients / n, torch.diag(p) - torch.outer(p, p), atol=4 * 0.5 / n**0.5)


def test_sampled_regression_gradients_are_standard_normal():
    """Entries of the second moment of n draws have standard deviation at most sqrt(2 / n)."""
    n = 10000
    draws = list(likelihood_of("regression").sampled_gradients(torch.zeros(n, 3).double(), None, 4, seed=0, offset=0))
    assert len(draws) == 4
    moment = sum(g.T @ g for g in draws) / n  # each scaled by 1 / sqrt(4)
    assert torch.allclose(moment, torch.eye(3, dtype=torch.float64), atol=4 * (2 / (4 * n)) ** 0.5)
    assert all(abs(correlation(a, b)) < 4 / (3 * n) ** 0.5 for a, b in zip(draws, draws[1:], strict=False))


def test_large_indices_do_not_collide():
    far = uniform(0, torch.arange(10) + 10**12, DRAWS)
    assert torch.cat([far, draws(0, 10)]).unique().numel() == 20 * DRAWS


@pytest.mark.parametrize("name", ["Categorical", "Bernoulli"])
def test_positions_that_are_padded_behind_change_no_draw_of_those_before(name):
    likelihood = getattr(likelihoods, name)()
    f = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few, more = (list(likelihood.sampled_gradients(g, None, 3, 1, 7)) for g in (f[:, :4], f))
    assert len(few) == 3 and not torch.equal(few[0], few[1])
    assert all(torch.equal(one, other[:, :4]) for one, other in zip(few, more, strict=True))


def left_padded(f, y, before, behind):
    """Positions that do not count before, behind, and one after the second of those that do."""
    g = torch.randn(len(f), before + f.shape[1] + 1 + behind, f.shape[2], dtype=f.dtype)
    labels = torch.full(g.shape[:2], -100)
    kept = torch.tensor([before, before + 1, *range(before + 3, before + f.shape[1] + 1)])
    g[:, kept], labels[:, kept] = f, y
    return g, labels, kept


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(("before", "behind"), [(0, 0), (4, 0), (3, 2)])
def test_positions_that_do_not_count_change_no_draw_wherever_they_are(num_samples, before, behind):
    law = likelihoods.WeightedCategorical(class_weights=[1.0, 2.0, 0.5, 0.0], ignore_index=-100)
    f = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(15).reshape(3, 5) % 4
    g, labels, kept = left_padded(f, y, before, behind)
    few, more = (list(law.sampled_gradients(*pair, num_samples, 1, 7)) for pair in ((f, y), (g, labels)))
    assert len(few) == num_samples
    for one, other in zip(few, more, strict=True):
        assert torch.equal(one, other[:, kept]) and bool(one.any())
        others = [i for i in range(g.shape[1]) if i not in kept]
        assert not other[:, others].any()


def test_examples_are_padded_each_by_its_own_length():
    law = likelihoods.WeightedCategorical(ignore_index=-100)
    f = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(2, 6, dtype=torch.long)
    wanted = next(law.sampled_gradients(f, y, 1, 1, 0))
    shifted, labels = f.roll(2, 1), y.clone()
    shifted[0], labels[1, :2] = f[0], -100
    found = next(law.sampled_gradients(shifted, labels, 1, 1, 0))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1, 2:], wanted[1, :4])


@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_first_sampling_numbers_draws_by_sample_and_place(num_samples):
    """As runs of 0.1 have it, that go on; the same where there is one position."""
    law = likelihoods.WeightedCategorical(ignore_index=-100)
    f = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(3, 5, dtype=torch.long)
    y[:, 0] = -100
    now = list(law.sampled_gradients(f[:, 1], y[:, 1], num_samples, 1, 7))
    law.sampling = 1
    then = list(law.sampled_gradients(f, y, num_samples, 1, 7))
    u = uniform(1, torch.arange(7, 10), num_samples * 5).reshape(3, num_samples, 5)
    for s in range(num_samples):
        label = (u[:, s, :, None] >= f.softmax(-1).cumsum(-1)).sum(-1)
        wanted = f.softmax(-1) - torch.nn.functional.one_hot(label, 4)
        wanted[:, 0] = 0
        torch.testing.assert_close(then[s], wanted * num_samples**-0.5)
    alone = list(law.sampled_gradients(f[:, 1], y[:, 1], num_samples, 1, 7))
    assert all(torch.equal(*pair) for pair in zip(now, alone, strict=True))
