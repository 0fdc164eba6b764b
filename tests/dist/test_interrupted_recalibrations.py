"""A recalibration that SIGINT or SIGTERM interrupts, at every kind of moment: what is said, what stays, and how it goes on."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import window_cases

from laplace_dist import cli
from laplace_dist.execution.inline import InlinePool
from laplace_dist.recalibration import RecalibrationJob
from laplace_dist.run import layout, pointer, recalibrations, windows
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan

GO_ON = "Everything committed so far is kept: run the same command again to go on."


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    place = tmp_path_factory.mktemp("interrupted") / "run"
    window_cases.fit_inline(window_cases.config(place, window="monday"))
    return place


@pytest.fixture
def run(fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / "run")


def command(place):
    given = ["--checkpoint", str(place), "--window=tuesday", "--data-args={day: tuesday}", "--ray-address=inline"]
    given += ["--model=dist_cases:convnet", "--data=window_cases:days", "--batch-size=4", "--segment-size=8"]
    return [*given, "--gpus-per-worker=0", "--grid-size=5", "--prior-range", "1e-4", "1e4", "--margin-nll=10"]


def recalibrate(place):
    return cli.recalibrate_main([*command(place), "--margin-ece=1"])


TASKS = {
    "map": "segment",
    "reduce": "sum of part",
    "candidate": "factors",
    "tune": "validation shard",
    "evaluate": "test shard",
    "compare": "comparison of candidate",
}
STEPS = {  # of the driver: where, and whether before or after it
    "before the decision is written": (recalibrations, "write_decision", "before"),
    "before promotion": (pointer, "promote", "before"),
    "after promotion": (pointer, "promote", "after"),
    "before partials go": (windows, "delete_owned", "before"),
}


class Once:
    """Sends this process a signal the first time that it is asked to."""

    def __init__(self, number):
        self.number, self.sent = number, False

    def __call__(self):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


def in_task(monkeypatch, beginning, send):
    real = InlinePool.submit

    def submit(self, task):
        real(self, task)
        if task.what.startswith(beginning):
            send()

    monkeypatch.setattr(InlinePool, "submit", submit)


def at_step(monkeypatch, owner, name, when, send):
    real = getattr(owner, name)

    def step(*given, **more):
        if when == "before":
            send()
        found = real(*given, **more)
        if when == "after":
            send()
        return found

    monkeypatch.setattr(owner, name, step)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *zip([*TASKS, *STEPS], [signal.SIGTERM, signal.SIGINT] * 5, strict=True),
        ("map", signal.SIGINT),
        ("after promotion", signal.SIGINT),
    ],
)
def test_an_interrupted_recalibration_says_how_to_go_on_and_does(run, monkeypatch, capfd, moment, number):
    store, send = Checkpoint(str(run)), Once(number)
    before = store.read(layout.CURRENT)
    with monkeypatch.context() as patch:
        if moment in TASKS:
            in_task(patch, TASKS[moment], send)
        else:
            at_step(patch, *STEPS[moment], send)
        assert recalibrate(run) == 128 + number and send.sent
    name = signal.Signals(number).name
    assert capfd.readouterr().err.splitlines()[-1] == f"interrupted by {name}. {GO_ON}"
    promoted = moment == "after promotion"
    assert (store.read(layout.CURRENT) != before) == promoted
    assert not store.list("jobs"), "its sign of life is gone, so that nobody waits for it"
    monkeypatch.setattr(RecalibrationJob, "wait", staticmethod(lambda seconds: pytest.fail("it waits for a dead job")))
    assert recalibrate(run) == 0
    out = capfd.readouterr().out
    assert ("was promoted by a job that died then" in out) == promoted
    found = recalibrations.read_decision(store, read_plan(store), "tuesday")
    history = pointer.history_of(pointer.read_current(store))
    assert found["promoted"] and not found.get("pending")
    assert [entry["version"] for entry in history][1:] == [found["candidate"]["version"]], "promoted once"


def test_what_was_done_before_is_not_done_again(run, monkeypatch):
    """Interrupted in the middle of its segments, it computes those that are left."""
    done, send = [], Once(signal.SIGTERM)
    real = InlinePool._outcome

    def outcome(self, task):
        if task.what.startswith("segment"):
            done.append(task.what)
            if len(done) == 2:
                send()
        return real(self, task)

    monkeypatch.setattr(InlinePool, "_outcome", outcome)
    assert recalibrate(run) == 143 and len(done) == 2
    assert recalibrate(run) == 0 and len(done) == 3 == len(set(done)), "the one in flight was committed"
