"""Jobs as processes of their own, forked from one that has imported what all of them import.

Such a start takes 50 ms instead of three seconds of a core, most of which go into importing torch. What is forked is as real as what
is started: a process with its own environment, directory, arguments, pipes and status, that signals reach and end. Whether Python
starts a job is tested in `test_end_to_end` and `test_job_submission`, which start it.

    python forked.py    takes orders at the socket that is its standard input, and ends with it
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOST = 2**20  # bytes of an order


class Forked:
    """A script in a process of its own, as far as tests use `subprocess.Popen` with pipes and text.

    Args:
        script: Path of the script.
        arguments: Its command line.
        environment: All of its environment; its directory is the repository's.
    """

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str]) -> None:
        (out, out_end), (err, err_end), (status, status_end) = (os.pipe() for _ in range(3))
        ends = [out_end, err_end, status_end]
        order = {"arguments": [str(script), *arguments], "environment": environment}
        socket.send_fds(_server()[0], [json.dumps(order).encode()], ends)
        for end in ends:
            os.close(end)
        self.stdout, self.stderr, self._status = os.fdopen(out), os.fdopen(err), os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Return the status once it has ended; of a signal its number below zero."""
        if self.returncode is None:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Return the rest of what it says, once it has ended."""
        with ThreadPoolExecutor(2) as pool:
            out, err = pool.map(lambda pipe: pipe.read(), (self.stdout, self.stderr))
        self.wait()
        return out, err


@cache
def _server() -> tuple[socket.socket, subprocess.Popen]:
    """Start the process that jobs are forked from, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, __file__], stdin=theirs, env=environment)
    theirs.close()
    return ours, process


# ------------------------------------------------------------------ in that process


def serve(orders: socket.socket) -> dict[str, Any] | None:
    """Fork for every order, and say how the forks end; returns in a fork, with its order, and when there are no more."""
    running: dict[int, tuple[int, int]] = {}
    with selectors.DefaultSelector() as waiting:
        waiting.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fd in running:
                    pid, status = running.pop(key.fd)
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
                    os.close(status)
                    continue
                text, ends, *_ = socket.recv_fds(orders, MOST, 3)
                if not text:
                    return None
                out, err, status = ends
                if (pid := os.fork()) == 0:
                    os.dup2(out, 1)
                    os.dup2(err, 2)
                    for other in [*ends, *running, *(end for _, end in running.values())]:
                        os.close(other)
                    return json.loads(text)
                os.close(out)
                os.close(err)
                os.write(status, f"{pid}\n".encode())
                handle = os.pidfd_open(pid)
                running[handle] = (pid, status)
                waiting.register(handle, selectors.EVENT_READ)


def carry_out(order: dict[str, Any]) -> None:
    """Do what `python script arguments` does from here on."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(ROOT)
    sys.argv = order["arguments"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    sys.path[1:2] = [path for path in order["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import laplace_dist.cli  # noqa: F401  which is what jobs import

    assert threading.active_count() == 1, "what is forked has one thread"
    if (order := serve(socket.socket(fileno=os.dup(0)))) is not None:
        carry_out(order)
