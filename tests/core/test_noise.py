"""Counter-based noise: a pure function of its coordinates, uniform and independent.

Statistics of fixed seeds are numbers, so that these tests cannot flicker; the bounds are four standard deviations.
"""

from __future__ import annotations

import torch

from laplace.curvature.noise import normal, uniform

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


def test_large_indices_do_not_collide():
    far = uniform(0, torch.arange(10) + 10**12, DRAWS)
    assert torch.cat([far, draws(0, 10)]).unique().numel() == 20 * DRAWS
