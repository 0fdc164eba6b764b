"""The line that a person sees while a run works, on a clock that the test moves."""

from __future__ import annotations

import io

import pytest

from laplace_dist.report import progress
from laplace_dist.report.progress import QUIET_SECONDS, Progress


@pytest.fixture
def clock(monkeypatch):
    """Return the time in a list of one, for the test to set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_leaves_out_what_was_there_before_and_the_start_of_the_workers(clock):
    out = io.StringIO()
    line = Progress("map", "segments", 12, done=2, out=out)
    clock[0] += 100
    line.tick(busy=0)
    for _ in range(4):
        clock[0] += 5
        line.done(50)
    assert out.getvalue().splitlines() == [
        "map: 2 of 12 segments were committed before",
        "map: 3/12 segments, 10 examples/s, 00:00:45 left",
        "map: 4/12 segments, 10 examples/s, 00:00:40 left",
        "map: 5/12 segments, 10 examples/s, 00:00:35 left",
        "map: 6/12 segments, 10 examples/s, 00:00:30 left",
    ]


def test_it_says_when_nothing_finishes_ever_more_seldom(clock):
    out = io.StringIO()
    line = Progress("map", "segments", 3, out=out)
    assert QUIET_SECONDS == 60.0
    for _ in range(60 * 8):
        clock[0] += 1
        line.tick(busy=2, oldest="")
    assert out.getvalue().splitlines() == [
        "map: 0/3 segments, none finished for 00:01:00, 2 at work",
        "map: 0/3 segments, none finished for 00:02:00, 2 at work",
        "map: 0/3 segments, none finished for 00:04:00, 2 at work",
        "map: 0/3 segments, none finished for 00:08:00, 2 at work",
    ]
    line.done(8)
    clock[0] += 59
    line.tick(busy=2)
    assert len(out.getvalue().splitlines()) == 5, "one line for the segment, and then the patience is new"


@pytest.mark.parametrize(
    ("busy", "said"), [(1, "1 at work on the evidence"), (3, "3 at work, the first of them on the evidence")]
)
def test_the_line_about_what_takes_long_says_what_it_is(clock, busy, said):
    out = io.StringIO()
    line = Progress("tune", "results", 1, out=out)
    clock[0] += 61
    line.tick(busy, "the evidence")
    assert out.getvalue() == f"tune: 0/1 results, none finished for 00:01:01, {said}\n"
