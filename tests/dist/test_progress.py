"""The line that a person sees while a run works, on a clock that the test moves."""

from __future__ import annotations

import io
import logging
import sys
from contextlib import nullcontext

import pytest

from laplace_dist.report import console, progress
from laplace_dist.report.progress import QUIET_SECONDS, Progress


@pytest.fixture
def clock(monkeypatch):
    """Return the time in a list of one, for the test to set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def unheard(monkeypatch):
    """Let nobody print what is said, as in a library that was just imported."""
    handlers = [logging.NullHandler()]
    monkeypatch.setattr(logging.getLogger("laplace_dist"), "handlers", handlers)
    return handlers


@pytest.fixture
def said(caplog):
    """Return a function that tells what has been said so far."""
    caplog.set_level(logging.INFO, logger="laplace_dist")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "laplace_dist"]


def test_the_rate_leaves_out_what_was_there_before_and_the_start_of_the_workers(clock, said):
    line = Progress("map", "segments", 12, done=2, every=5)
    clock[0] += 100
    line.tick(busy=0)
    for _ in range(4):
        clock[0] += 5
        line.done(50)
    assert said() == [
        "map: 2 of 12 segments were committed before",
        "map: 3/12 segments, 10 examples/s, 00:00:45 left",
        "map: 4/12 segments, 10 examples/s, 00:00:40 left",
        "map: 5/12 segments, 10 examples/s, 00:00:35 left",
        "map: 6/12 segments, 10 examples/s, 00:00:30 left",
    ]


def test_it_says_when_nothing_finishes_ever_more_seldom(clock, said):
    line = Progress("map", "segments", 3)
    assert QUIET_SECONDS == 60.0
    for _ in range(60 * 8):
        clock[0] += 1
        line.tick(busy=2, oldest="")
    assert said() == [
        "map: 0/3 segments, none finished for 00:01:00, 2 at work",
        "map: 0/3 segments, none finished for 00:02:00, 2 at work",
        "map: 0/3 segments, none finished for 00:04:00, 2 at work",
        "map: 0/3 segments, none finished for 00:08:00, 2 at work",
    ]
    line.done(8)
    clock[0] += 59
    line.tick(busy=2)
    assert len(said()) == 5, "one line for the segment, and then the patience is new"


@pytest.mark.parametrize(
    ("busy", "task"), [(1, "1 at work on the evidence"), (3, "3 at work, the first of them on the evidence")]
)
def test_the_line_about_what_takes_long_says_what_it_is(clock, said, busy, task):
    line = Progress("tune", "results", 1)
    clock[0] += 61
    line.tick(busy, "the evidence")
    assert said() == [f"tune: 0/1 results, none finished for 00:01:01, {task}"]


def test_a_line_comes_every_ten_seconds_and_counts_what_was_done_again(clock, said):
    line = Progress("map", "segments", 100)
    line.failed(lost=False)
    line.failed(lost=True)
    for _ in range(30):
        clock[0] += 1
        line.done(10)
    assert said() == [
        "map: 10/100 segments, 10 examples/s, 00:01:30 left, 1 retried, 1 lost with their nodes",
        "map: 20/100 segments, 10 examples/s, 00:01:20 left, 1 retried, 1 lost with their nodes",
        "map: 30/100 segments, 10 examples/s, 00:01:10 left, 1 retried, 1 lost with their nodes",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_there_is_a_bar_with_rate_rest_workers_and_retries_and_the_last_line_stays(clock, monkeypatch):
    """The bar is gone when the stage is, or when it is closed in the middle."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with console.printed():
        line = Progress("map", "segments", 3)
        for _ in range(2):
            clock[0] += 2
            line.done(100)
            line.failed(lost=True)
            line.tick(busy=2, alive=4)
            line._live._display.refresh()
        assert (
            "map" in screen.getvalue()
            and "2/3 segments · 50 examples/s · 00:00:02 left · 4 workers · 2 lost" in screen.getvalue()
        )
        line.done(100)
        assert line._live is None
        assert "map: 3/3 segments, 75 examples/s, 00:00:04, 2 lost with their nodes\n" in screen.getvalue()
        other = Progress("tune", "shards", 3)
        other.tick(busy=1, alive=1)
        other.close()
        assert other._live is None


@pytest.mark.parametrize("attended", [True, False])
def test_in_a_library_or_a_pipe_there_is_no_bar(clock, unheard, monkeypatch, attended):
    screen = io.StringIO() if attended else Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with console.printed() if attended else nullcontext():
        line = Progress("map", "segments", 3)
        line.tick(busy=2, alive=4)
    assert line._live is None and screen.getvalue() == ""


def test_the_library_says_nothing_until_somebody_listens(clock, capsys, said, unheard):
    """Under pytest somebody does: what is said goes to the logger and not to standard output."""
    Progress("map", "segments", 1).done(1)
    assert said() and capsys.readouterr().out == ""
    with console.printed():
        Progress("map", "segments", 1).done(1)
    assert capsys.readouterr().out.startswith("map: 1/1 segments")
    assert logging.getLogger("laplace_dist").handlers == unheard and len(unheard) == 1, "printing has ended"


def test_the_package_has_a_handler_that_does_nothing_so_that_logging_does_not_complain():
    assert isinstance(logging.getLogger("laplace_dist").handlers[0], logging.NullHandler)
