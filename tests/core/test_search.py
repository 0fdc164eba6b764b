"""The search on a lattice: it finds what a scan of every point finds, in few rounds, wherever that lies."""

from __future__ import annotations

import math

import pytest

from laplace.search import TOLERANCE, Found, Lattice, Round, Scored, lowest, next_step, scores_of, vertex

LATTICE = Lattice()


def carry_out(loss, lattice=LATTICE, limit=math.nan, to_limit=False, coarse_loss=None):
    """Search a loss of the exponent; returns the end and the rounds."""
    done = []
    while not isinstance(step := next_step(lattice, done, to_limit), Found):
        assert step.indices, "a round without points would go on for ever"
        assert len(done) < 30  # by far
        used = coarse_loss if step.coarse and coarse_loss else loss
        scores = tuple(used(lattice.low + i * lattice.step) for i in step.indices)
        done.append(Scored(step, scores, limit))
    return step, done


def bowl(centre, width=3.0):
    """Lowest at the centre, and as flat far off as the loss of a predictive whose variance no longer changes."""
    return lambda exponent: 1 - math.exp(-(((exponent - centre) / width) ** 2))


def exponent(found, lattice=LATTICE):
    return lattice.low + found.index * lattice.step


@pytest.mark.parametrize("centre", [-11.4, -6.0, -4.2, -4.0, -1.3, 0.0, 0.7, 3.9, 4.1, 8.8, 13.0])
def test_the_best_point_is_found_far_outside_the_range_too(centre):
    found, done = carry_out(bowl(centre))
    assert found.where == "inside"
    assert abs(exponent(found) - centre) <= LATTICE.step / 2 + 1e-9
    fine = scores_of([scored for scored in done if not scored.round.coarse])
    assert {found.index - 1, found.index + 1} <= set(fine), "both neighbours were looked at"


def test_it_costs_less_than_the_whole_grid():
    _, done = carry_out(bowl(0.7))
    assert [scored.round.coarse for scored in done] == [True, False]
    assert sum(len(scored.round.indices) for scored in done) <= 20 < LATTICE.size


@pytest.mark.parametrize("size", [2, 3, 9, 21, 41, 100])
@pytest.mark.parametrize("centre", [-2.9, 0.4, 3.3])
def test_the_best_point_is_that_of_the_whole_grid(size, centre):
    lattice = Lattice(size=size, extends=False)
    found, _ = carry_out(bowl(centre), lattice)
    whole = {i: bowl(centre)(lattice.low + i * lattice.step) for i in range(size)}
    assert whole[found.index] == min(whole.values())


def test_a_given_range_is_not_left_and_its_edge_is_said():
    for centre, index in ((9.0, 40), (-9.0, 0)):
        found, done = carry_out(bowl(centre, 20), Lattice(extends=False))
        assert (found.index, found.where) == (index, "edge")
        assert all(0 <= i <= 40 for scored in done for i in scored.round.indices)


def falling(exponent):
    """A loss that falls to that of the limit, which it reaches to within the tolerance at 10^6.6."""
    return 0.5 + 10 ** (-(exponent + 4) * 0.377)


def test_a_loss_that_falls_to_its_limit_stops_where_it_is_the_limit():
    found, _ = carry_out(falling, limit=0.5)
    assert found.where == "high"
    assert abs(falling(exponent(found)) - 0.5) <= TOLERANCE


def test_where_the_limit_is_better_than_the_best_inside_the_search_goes_there():
    def loss(exponent):  # a hollow at 1, and a deeper end
        return falling(exponent) - 0.05 * math.exp(-((exponent - 1) ** 2)) + 0.06 / (1 + 10 ** (exponent - 5))

    inside = min(loss(k / 10) for k in range(-40, 41))
    assert inside > 0.5 + TOLERANCE
    found, _ = carry_out(loss, limit=0.5)
    assert found.where == "high"
    assert abs(loss(exponent(found)) - 0.5) <= TOLERANCE


def test_the_limit_can_be_asked_for():
    found, done = carry_out(lambda e: 0.5 + bowl(0)(e) * 0.1 - 0.1 / (1 + 10**e), limit=0.6, to_limit=True)
    assert found.where == "high"
    assert not done[-1].round.coarse


@pytest.mark.parametrize("centre", [-9.0, 9.0])
def test_a_hollow_beyond_a_plain_is_found(centre):
    """All that the first round sees is the limit, or a loss that no longer changes."""

    def loss(exponent):
        return 0.5 - 0.1 * math.exp(-((exponent - centre) ** 2)) + 0.2 / (1 + 10 ** (4 * (exponent - centre + 1)))

    found, done = carry_out(loss, limit=0.5)
    assert found.where == "inside" and abs(exponent(found) - centre) < 0.7
    assert loss(exponent(found)) == pytest.approx(min(loss(centre + k / 100) for k in range(-100, 101)), abs=1e-3)


def test_a_loss_that_no_longer_changes_below_is_said():
    found, _ = carry_out(lambda e: 1 / (1 + math.exp(-4 * (e + 5))))
    assert found.where == "low"
    assert exponent(found) < -6


def test_a_flat_loss_without_a_limit_ends_in_the_middle():
    found, done = carry_out(lambda e: 1.0)
    assert found.where in ("low", "high") and len(done) <= 8


@pytest.mark.parametrize("extends", [True, False])
def test_a_loss_that_is_fixed_ends_the_search_once_all_data_have_said_so(extends):
    lattice = Lattice(extends=extends)
    first = next_step(lattice, [])
    part = Scored(first, (1.0,) * len(first.indices), 1.0, fixed=True)
    whole = next_step(lattice, [part])
    assert (whole.indices, whole.coarse) == (tuple(range(lattice.size)), False)
    found = next_step(lattice, [part, Scored(whole, (1.0,) * lattice.size, 1.0, fixed=True)])
    assert (lattice.value(found.index), found.where) == (pytest.approx(1.0), "flat")


@pytest.mark.parametrize("centre", [-9.0, -1.0, 9.0])
def test_a_part_of_the_data_on_which_nothing_moves_hides_no_best_point(centre):
    first = next_step(LATTICE, [])
    done = [Scored(first, (1.0,) * len(first.indices), 1.0, fixed=True)]
    while not isinstance(step := next_step(LATTICE, done), Found):
        assert len(done) < 30
        done.append(Scored(step, tuple(bowl(centre)(LATTICE.low + i * LATTICE.step) for i in step.indices), 1.0))
    assert (step.where, exponent(step)) == ("inside", pytest.approx(centre))


def test_the_end_of_all_numbers_is_an_edge():
    found, _ = carry_out(lambda e: -e)
    assert (found.where, exponent(found)) == ("edge", pytest.approx(16))


def test_a_part_of_the_data_that_misleads_costs_a_round_and_nothing_else():
    found, done = carry_out(bowl(2.0), coarse_loss=bowl(-1.0))
    assert abs(exponent(found) - 2.0) <= LATTICE.step / 2
    assert len(done) > 2


def test_losses_that_are_not_finite_are_left_out_and_none_at_all_is_refused():
    found, _ = carry_out(lambda e: bowl(0)(e) if e > -2 else math.nan)
    assert abs(exponent(found)) <= LATTICE.step / 2
    with pytest.raises(ValueError, match="No value that was tried has a finite score"):
        carry_out(lambda e: math.inf)
    assert lowest({0: math.nan, 1: 2.0, 2: 2.0, 3: 2.0, 4: -math.inf}) == 2


def test_an_empty_range_is_refused():
    for arguments in ({"size": 1}, {"low": 4.0}):
        with pytest.raises(ValueError, match="is empty; give size >= 2 and min < max"):
            Lattice(**arguments)


def test_the_vertex_of_a_parabola():
    assert vertex([1.0, 2.0, 3.0], [(v - 1.7) ** 2 + 5 for v in (1, 2, 3)]) == pytest.approx((1.7, 5))
    assert vertex([1.0, 2.0], [3.0, 2.0]) == (2.0, 2.0)
    assert vertex([1.0, 2.0, 3.0], [math.inf, 2.0, 3.0]) == (2.0, 2.0)


def test_rounds_follow_from_what_was_scored_alone():
    _, done = carry_out(bowl(7.3))
    for k in range(len(done)):
        assert next_step(LATTICE, done[:k]) == done[k].round
    assert isinstance(done[0].round, Round)
