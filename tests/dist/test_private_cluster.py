"""A private cluster that does not start: it is ended, and said in a line with ways out."""

from __future__ import annotations

import os
import sys
import threading
import time

import psutil
import pytest

from laplace_dist.errors import Interrupted, RunFailed
from laplace_dist.execution import private_cluster, signals
from laplace_dist.execution.private_cluster import PrivateCluster


@pytest.fixture
def mine():
    """Return what lists the processes that this one has started since."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    return lambda: [p for p in psutil.Process().children() if p.pid not in before]


def test_a_start_that_hangs_is_given_up_with_a_line_before_and_nothing_left(monkeypatch, mine):
    monkeypatch.setattr(private_cluster, "START_SECONDS", 0.4)
    said, begun = [], time.monotonic()
    with pytest.raises(RunFailed, match="did not start within 0.4 s, and was ended.*--ray-address inline"):
        started = PrivateCluster({}, said.append, [sys.executable, "-c", "import time; time.sleep(600)"])
        with started:
            started.address()
    assert time.monotonic() - begun < 10
    assert said == ["Ray: still starting after 0.2 s; this is given up after 0.4 s"]
    assert mine() == []


def test_a_start_that_fails_says_what_the_process_wrote(mine):
    with pytest.raises(RunFailed, match=r"did not start \(status 3\); it wrote: …no space left on this device"):
        command = "import sys; print('no space left\\n on this device', file=sys.stderr); sys.exit(3)"
        with PrivateCluster({}, lambda text: None, [sys.executable, "-c", command]) as started:
            started.address()
    assert mine() == []


def test_a_start_that_is_interrupted_leaves_nothing(mine):
    with signals.heeded():
        threading.Timer(0.3, os.kill, [os.getpid(), 15]).start()
        with pytest.raises(Interrupted):
            with PrivateCluster(
                {}, lambda text: None, [sys.executable, "-c", "import sys; sys.stdin.read()"]
            ) as started:
                started.address()
    assert mine() == []


def test_the_process_of_a_cluster_ends_when_its_input_does_even_in_the_middle_of_its_start(tmp_path):
    """As when the driver is killed: Ray hangs here for good."""
    (tmp_path / "ray.py").write_text(
        f"import pathlib, time; pathlib.Path({str(tmp_path / 'there')!r}).touch(); time.sleep(600)"
    )
    import subprocess

    process = subprocess.Popen(
        [sys.executable, "-P", private_cluster.head.__file__, "{}"],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    while not (tmp_path / "there").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.stdin.close()
    assert process.wait(10) == 1
