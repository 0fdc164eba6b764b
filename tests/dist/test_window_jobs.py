"""Recalibrations of one run: two at once, and those that die at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from window_cases import add, config, factors, same, two_windows

import laplace_dist
from laplace_dist.errors import SettingsError
from laplace_dist.execution.inline import InlinePool
from laplace_dist.recalibration import RecalibrationJob, rollback
from laplace_dist.run import layout, pointer, recalibrations
from laplace_dist.run.checkpoint import Checkpoint, open_json


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with two windows; tests copy it."""
    return two_windows(tmp_path_factory.mktemp("windows") / "run")


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def passing(store, job, *, lives):
    """Return what lets time pass without passing any: another job renews its sign of life meanwhile, or is silent for long."""

    def wait(seconds):
        path = Path(store.url, layout.lease_key(job))
        when = path.stat().st_mtime + (seconds if lives else -recalibrations.SILENT_SECONDS)
        os.utime(path, (when, when))

    return staticmethod(wait)


def test_of_two_at_once_one_works_and_the_other_says_so(run, capsys, monkeypatch):
    with RecalibrationJob(config(run, "wednesday", window="wednesday"), laplace_dist.Inline) as job:
        assert job.take()
        monkeypatch.setattr(RecalibrationJob, "wait", passing(job.store, job.session.lease.job, lives=True))
        assert add(run, "wednesday") is None
        said = capsys.readouterr().out
        assert "has begun and not ended; waiting up to 600 s" in said and "another recalibration of" in said
    assert add(run, "wednesday").promoted


def test_a_job_that_gave_no_sign_of_life_is_taken_over_from_and_promotes_nothing(run, monkeypatch):
    store = Checkpoint(str(run))
    job = RecalibrationJob(config(run, "wednesday", window="wednesday"), laplace_dist.Inline)
    assert job.take()
    monkeypatch.setattr(RecalibrationJob, "wait", passing(store, job.session.lease.job, lives=False))
    assert add(run, "wednesday").promoted
    before = store.read(layout.CURRENT)
    with pytest.raises(SettingsError, match="another recalibration of .* has taken over.*Nothing was promoted"):
        job._promote("late", {"candidate": {"version": "0" * 16, "tuning": None, "evaluation": None}, "why": "late"})
    assert store.read(layout.CURRENT) == before
    job.session.close()


KILLED = """
import os, signal, sys
import window_cases
from laplace_dist.recalibration import RecalibrationJob

RecalibrationJob.sum_window = lambda self: os.kill(os.getpid(), signal.SIGKILL)
window_cases.add(sys.argv[1], "wednesday")
"""


def test_a_recalibration_that_was_killed_is_continued_by_the_same_command(run, monkeypatch, capsys):
    """At once: the sign of life of the dead one is as young as that of one that lives."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(run)], env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert ended.returncode == -signal.SIGKILL
    store = Checkpoint(str(run))
    job = open_json(store.read(layout.RECALIBRATION_LEASE), layout.RECALIBRATION_LEASE)["job"]
    assert store.exists(layout.lease_key(job))
    monkeypatch.setattr(RecalibrationJob, "wait", passing(store, job, lives=False))
    assert add(run, "wednesday").promoted
    assert "continuing window wednesday" in capsys.readouterr().out


def test_what_is_current_counts_from_the_lease_on(run, monkeypatch):
    """A promotion by the job before, which ends at that moment, is no reason to refuse after all the work."""
    first, real = pointer.read_current(Checkpoint(str(run)))["history"][0]["version"], recalibrations.take

    def meanwhile(*given):
        rollback(str(run), first)
        return real(*given)

    monkeypatch.setattr(recalibrations, "take", meanwhile)
    assert add(run, "wednesday", windows="monday,tuesday,wednesday").promoted


def test_what_another_has_made_current_meanwhile_is_not_overwritten(run, monkeypatch):
    store, real = Checkpoint(str(run)), RecalibrationJob.score
    history = pointer.read_current(store)["history"]

    def meanwhile(self, version, tuning):
        if pointer.read_current(store)["history"] == history:
            rollback(str(run), history[0]["version"])
        return real(self, version, tuning)

    monkeypatch.setattr(RecalibrationJob, "score", meanwhile)
    with pytest.raises(SettingsError, match=f"another job has made version {history[0]['version']} current"):
        add(run, "wednesday")
    assert pointer.read_current(store)["version"] == history[0]["version"]
    assert add(run, "wednesday").promoted


def test_killed_after_any_task_the_same_command_goes_on(run, kept, tmp_path, monkeypatch):
    submitted, real = [], InlinePool.submit
    monkeypatch.setattr(InlinePool, "submit", lambda self, task: submitted.append(task.what) or real(self, task))
    wanted = add(run, "wednesday")
    again, total, left = tmp_path / "again", len(submitted), [0]
    shutil.copytree(kept, again)

    def deadly(self, task):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, task)

    monkeypatch.setattr(InlinePool, "submit", deadly)
    found, deaths = None, 0
    while found is None:
        left[0] = deaths  # so many tasks are carried out, the next one kills
        try:
            found = add(again, "wednesday")
        except KeyboardInterrupt:
            deaths += 1
    assert 5 < deaths < total and found == replace(wanted, checkpoint=str(again))
    assert same(factors(run), factors(again))
