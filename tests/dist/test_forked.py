"""A fork is what a start of Python would be, as far as a script can see and a test can tell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from forked import ROOT, Forked

SCRIPT = """
import json, os, signal, sys
seen = {"arguments": sys.argv, "directory": os.getcwd(), "environment": dict(os.environ), "path": sys.path, "name": __name__}
seen["handlers"] = {number: str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
seen["files"] = sorted(name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
seen["input"] = sys.stdin.read()
print(json.dumps(seen))
print("a line", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_fork_sees_what_a_started_script_sees(script, environment):
    environment["LAPLACE_DIST_TESTS"] = "one = two"
    command = [sys.executable, str(script), "3", "b c"]
    started = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    forked = Forked(script, command[2:], environment)
    out, err = forked.communicate()
    assert (json.loads(out), err, forked.returncode) == (json.loads(started.stdout), started.stderr, 3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fork_ends_by_a_signal_and_that_is_its_status(tmp_path, environment, number):
    script = tmp_path / "waits.py"
    script.write_text("import signal\nprint('there', flush=True)\nsignal.pause()")
    process = Forked(script, [], environment)
    assert process.stdout.readline() == "there\n"
    process.send_signal(number)
    assert process.wait() == -number and process.communicate() == ("", "")


def test_several_forks_end_in_any_order(script, environment):
    several = [Forked(script, [str(status)], environment) for status in range(3)]
    assert [process.wait() for process in reversed(several)] == [2, 1, 0]
    assert [bool(process.communicate()[0]) for process in several] == [True] * 3


def test_an_error_leaves_with_its_traceback_and_status_1(tmp_path, environment):
    script = tmp_path / "fails.py"
    script.write_text("raise ValueError('on purpose')")
    process = Forked(script, [], environment)
    assert process.communicate()[1].endswith("ValueError: on purpose\n") and process.returncode == 1
