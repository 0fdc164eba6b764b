"""How many module groups there are: the planner's number, the flag's, the smallest largest group; and what is refused."""

from __future__ import annotations

from itertools import combinations
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_module_groups import config, fit, sums_of

import laplace_dist
from laplace_dist import cli
from laplace_dist.errors import SettingsError
from laplace_dist.execution.inline import Inline
from laplace_dist.plan.groups import fewest, most, plan_groups
from laplace_dist.plan.parts import places, triangle
from laplace_dist.plan.worker_memory import groups_for
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan

FULL = {"factors": {"full": {"shape": [483, 483], "symmetric": True}}}


# ------------------------------------------------------------------ how many, and what is refused


class Little(Inline):
    """A machine with less memory than all sums take: 483 weights squared in float64, and the model."""

    bytes = 1_400_000

    def memory(self, device):
        return self.bytes


def test_the_planner_divides_what_no_worker_could_hold(tmp_path, caplog):
    with caplog.at_level("INFO", logger="laplace_dist"):
        fit(config(tmp_path / "run"), Little)
    plan = read_plan(Checkpoint(str(tmp_path / "run")))
    assert len(plan.groups) == 3 and max(group.nbytes for group in plan.groups) < 1_400_000 * 0.8
    assert "module groups: 3, so as many passes over the data" in caplog.text
    fit(config(tmp_path / "whole"))
    assert sums_of(tmp_path / "run")[0] == sums_of(tmp_path / "whole")[0]
    assert len(read_plan(Checkpoint(str(tmp_path / "whole"))).groups) == 1
    tiny = type("Tiny", (Little,), {"bytes": 100_000})
    with pytest.raises(SettingsError, match="for the largest of 3 module groups of the sums of a full posterior"):
        fit(config(tmp_path / "no"), tiny)
    assert not (tmp_path / "no" / "plan.json").exists()


def test_what_a_plan_of_several_groups_takes(tmp_path):
    one = laplace_dist.estimate(config(tmp_path / "run"))
    three = laplace_dist.estimate(config(tmp_path / "run", module_groups=3))
    assert (one.module_groups, three.module_groups) == (1, 3)
    assert three.batches == 3 * one.batches and three.segments == one.segments
    assert three.sums_bytes == max(group.nbytes for group in plan_groups(FULL, 3)) < one.sums_bytes == 8 * 483**2
    assert 0.8 * one.partial_bytes < three.partial_bytes < 1.3 * one.partial_bytes
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hessian_structure": "lowrank"}, "--module-groups: got 2 with --hessian-structure lowrank, whose basis"),
        ({"backend": "curvlinops"}, "--module-groups: got 2 with --hessian-structure full and --backend curvlinops"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(changes, said, tmp_path):
    with pytest.raises(SettingsError, match=said):
        fit(config(tmp_path, **{"module_groups": 2, **changes}))
    with pytest.raises(SettingsError, match="--module-groups: got 2; a training by empirical Bayes"):
        laplace_dist.marglik_train(config(tmp_path, module_groups=2), executor=laplace_dist.Inline)


@pytest.mark.parametrize("job", ["tune", "evaluate", "recalibrate"])
def test_a_job_that_follows_the_fits_plan_has_no_such_flag(job, tmp_path, capsys):
    flags = [f"--checkpoint={tmp_path}", "--module-groups=2"]
    status = cli.recalibrate_main(flags) if job == "recalibrate" else cli.main(job, flags)
    assert status == 2 and "--module-groups: does nothing in this job" in capsys.readouterr().err


# ------------------------------------------------------------------ the law of the cut


@st.composite
def specs(draw):
    factors = {}
    for number in range(draw(st.integers(1, 5))):
        width = draw(st.sampled_from([1, 5, 192, 193, 400, 700]))
        square = draw(st.booleans())
        shape = [width, width] if square else draw(st.sampled_from([[], [width], [width, 3]]))
        factors[f"f{number}"] = {"shape": shape, "symmetric": square}
    return {"factors": factors}


@settings(max_examples=150, deadline=None)
@given(specs(), st.integers(1, 8))
def test_groups_cover_the_vector_once_and_the_largest_is_as_small_as_can_be(spec, count):
    groups = plan_groups(spec, count)
    assert len(groups) == min(count, most(spec)) and [group.number for group in groups] == list(range(len(groups)))
    edges = [group.start for group in groups] + [groups[-1].stop]
    assert edges[0] == 0 and edges[-1] == places(spec)[-1].stop and edges == sorted(set(edges))
    assert [group.stop for group in groups] == edges[1:]
    for group in groups:
        for place in group.places:
            first, last = place.rows
            size = triangle(last) - triangle(first) if place.symmetric else prod(place.shape)
            assert place.stop - place.start == size
    ends = [pair[1] for pair in _cuts(spec)]
    inner = [*combinations(ends[:-1], len(groups) - 1)][:2000]
    best = min(max(_bytes(spec, a, b) for a, b in zip((0, *cut), (*cut, ends[-1]), strict=True)) for cut in inner)
    if len(inner) < 2000:
        assert max(group.nbytes for group in groups) == best
    assert fewest(spec, max(group.nbytes for group in groups)) <= len(groups)
    assert fewest(spec, 7) is None


def _cuts(spec):
    """Yield first and last entry of the smallest pieces, worked out one by one."""
    at = 0
    for factor in spec["factors"].values():
        if not factor["symmetric"]:
            yield at, at + prod(factor["shape"])
            at += prod(factor["shape"])
            continue
        width = factor["shape"][0]
        for first in range(0, width, 192):
            last = min(first + 192, width)
            yield at + first * (first + 1) // 2, at + last * (last + 1) // 2
        at += width * (width + 1) // 2


def _bytes(spec, start, stop):
    """Return what the entries from start to stop take as rows of matrices, row by row."""
    at, total = 0, 0
    for factor in spec["factors"].values():
        if not factor["symmetric"]:
            size = prod(factor["shape"])
            total += size if start <= at < stop else 0
            at += size
            continue
        width = factor["shape"][0]
        ends = at + np.cumsum(np.arange(1, width + 1))
        rows = np.flatnonzero((ends > start) & (ends <= stop))
        total += len(rows) * (rows[-1] + 1) if len(rows) else 0
        at += width * (width + 1) // 2
    return 8 * int(total)


@pytest.mark.parametrize(
    ("memory", "count"),
    [(None, 1), (8 * 483**2 + 1000, 1), (8 * 483**2 + 999, 2), (1_300_000, 3), (0, 3)],
)
def test_how_many_groups_a_memory_asks_for(memory, count):
    spec = {**FULL, "structure": "full", "blocks": [{"shape": [483]}]}
    assert groups_for(spec, 1000, memory) == count
