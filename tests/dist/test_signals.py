"""SIGINT and SIGTERM, and a driver that is killed: what is in flight, what is said, and what stays behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import dist_cases
import fault_cases
import psutil
import pytest
from test_loop import Script, tasks

from laplace_dist.errors import Interrupted
from laplace_dist.execution import loop, signals
from laplace_dist.execution.loop import run_tasks
from laplace_dist.run.checkpoint import Checkpoint

TRAP = 17  # in the third segment of six


@pytest.fixture
def heeded():
    with signals.heeded():
        yield


# ------------------------------------------------------------------ the handlers


def signalled(pool, number, after):
    """Send this process a signal before the pool's answer to a task."""
    before = pool.wait

    def wait(seconds, limit):
        if pool.attempts.total() == after and not signals._seen.number:
            os.kill(os.getpid(), number)
        return before(seconds, limit)

    pool.wait = wait


@pytest.mark.parametrize("number", signals.HEEDED)
def test_what_is_in_flight_finishes_and_nothing_new_is_begun(heeded, number, capfd):
    pool, done = Script(size=3), []
    signalled(pool, number, after=6)
    with pytest.raises(Interrupted) as caught:
        run_tasks(pool, tasks(100), lambda task, receipt: done.append(task.what))
    assert caught.value.number == number
    assert len(done) == 6 + 3 and pool.busy == 0
    assert "no new tasks; what is in flight may finish" in capfd.readouterr().err


def test_what_does_not_finish_in_time_is_left(heeded, monkeypatch):
    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.05)

    class Slow(Script):
        def wait(self, seconds, limit):
            if signals._seen.number:
                time.sleep(0.01)
                return []
            return super().wait(seconds, limit)

    pool, done = Slow(size=3), []
    signalled(pool, signal.SIGTERM, after=6)
    with pytest.raises(Interrupted):
        run_tasks(pool, tasks(100), lambda task, receipt: done.append(task.what))
    assert len(done) == 6 and pool.busy > 0


def test_outside_of_tasks_a_signal_is_raised_at_once_and_is_no_error(heeded):
    with pytest.raises(Interrupted):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except Exception:
            pytest.fail("an interruption was handled as an error")


def test_handlers_are_set_back_and_those_of_others_are_replaced():
    before = [signal.getsignal(number) for number in signals.HEEDED]
    with signals.heeded():
        ours = signal.getsignal(signal.SIGTERM)
        with signals.kept():
            signal.signal(signal.SIGTERM, lambda *_: None)
        assert signal.getsignal(signal.SIGTERM) == ours
    assert [signal.getsignal(number) for number in signals.HEEDED] == before


def test_another_thread_cannot_heed_signals_and_does_not_try():
    def inside():
        with signals.heeded(), signals.kept():
            found.append(True)

    found = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [True]


# ------------------------------------------------------------------ whole jobs


class Running:
    """A job that waits inside the third segment, and all processes that it has started."""

    def __init__(self, folder: Path, environment, **changes):
        self.folder = folder
        data_args = {"folder": str(folder), "trap": TRAP}
        chosen = dist_cases.config(folder / "run", data="signal_cases:Gate", data_args=data_args, **changes)
        self.process = fault_cases.start_job(folder / "job.json", environment, chosen=chosen)
        dist_cases.wait_for(folder, "waiting-*")
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def end(self, *numbers: int) -> tuple[int, str]:
        """Send signals, the second one once the first was heeded; let go, and return the status and what was said."""
        line = ""
        for number in numbers:
            self.process.send_signal(number)
            line += self.process.stderr.readline()
        if len(numbers) == 1:
            (self.folder / "go").touch()
        _, err = self.process.communicate()
        return self.process.returncode, line + err

    def gone(self) -> None:
        """Assert that nothing stays behind."""
        _, alive = psutil.wait_procs(self.started, timeout=15)
        assert alive == []

    @property
    def committed(self) -> int:
        return len(fault_cases.manifests(Checkpoint(str(self.folder / "run"))))


GO_ON = "Everything committed so far is kept: run the same command again to go on."


def test_an_interrupted_job_without_ray_commits_its_segment_and_says_how_to_go_on(tmp_path, environment):
    job = Running(tmp_path, environment, ray_address="inline")
    status, err = job.end(signal.SIGINT)
    assert (status, job.committed) == (130, 3), err
    assert err.splitlines()[-1] == f"interrupted by SIGINT. {GO_ON}" and len(err.splitlines()) == 2
    dist_cases.run_inline(dist_cases.config(tmp_path / "other"))
    chosen = dist_cases.config(
        tmp_path / "run", data="signal_cases:Gate", data_args={"folder": str(tmp_path), "trap": TRAP}
    )
    dist_cases.run_inline(chosen)
    assert job.committed == 6
    runs = [fault_cases.factors(Checkpoint(str(tmp_path / name)))[1] for name in ("run", "other")]
    assert runs[0] == runs[1]


def test_a_second_signal_leaves_at_once(tmp_path, environment):
    job = Running(tmp_path, environment, ray_address="inline")
    status, err = job.end(signal.SIGTERM, signal.SIGTERM)
    assert (status, job.committed) == (143, 2), err
    assert "SIGTERM: leaving at once" in err


def test_an_interrupted_job_on_ray_commits_its_segment_and_leaves_no_process(tmp_path, environment):
    job = Running(tmp_path, environment, ray_address="local", num_workers=1)
    status, err = job.end(signal.SIGTERM)
    assert (status, job.committed) == (143, 3), err
    assert err.splitlines()[-1] == f"interrupted by SIGTERM. {GO_ON}" and len(err.splitlines()) == 2
    assert len(job.started) > 3
    job.gone()


def test_a_driver_that_is_killed_leaves_no_process(tmp_path, environment):
    job = Running(tmp_path, environment, ray_address="local", num_workers=1)
    job.process.kill()
    assert job.process.wait() == -signal.SIGKILL
    job.process.communicate()
    assert len(job.started) > 3
    job.gone()


def test_an_interrupted_job_leaves_no_trace_in_a_process_that_begins_another(tmp_path):
    """As a notebook does."""
    with pytest.raises(Interrupted), signals.heeded():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # which the signal ends
    version, _ = dist_cases.run_inline(dist_cases.config(tmp_path))
    assert version
