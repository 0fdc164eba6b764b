"""Jobs as processes of their own, forked from one that has imported what all of them import.

Such a start takes 50 ms instead of three seconds of a core, most of which go into importing torch. What is forked is as real as what
is started: a process with its own environment, directory, arguments, pipes and status, that signals reach and end. Whether Python
starts a job is tested in `test_end_to_end` and `test_job_submission`, which start it.

    python forked.py             takes orders at the socket that is its standard input, and ends with it
    python forked.py workers     and those of Ray's workers at another one, `WORKERS` in the environment

Ray is told to start this file where it starts a worker, in the cluster that tests share: it hands the start on, and is done.

    python forked.py --node-ip-address=...     what Ray gives its worker
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
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOST = 2**20  # bytes of an order
WORKERS = "LAPLACE_DIST_TESTS_WORKERS"  # where workers of Ray are ordered


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
        order = {"arguments": [str(script), *arguments], "environment": environment, "directory": str(ROOT)}
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
    return _start([], {})


def _start(arguments: list[str], more: dict[str, str]) -> tuple[socket.socket, subprocess.Popen]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdin=theirs, env=environment)
    theirs.close()
    return ours, process


@contextmanager
def workers() -> Iterator[None]:
    """Have the nodes of Ray that this process starts meanwhile fork their workers."""
    import pytest
    from ray._private.node import Node

    begin = Node.__init__

    def beginning(node: Node, ray_params: Any, *given: Any, **more: Any) -> None:
        ray_params.worker_path = __file__
        begin(node, ray_params, *given, **more)

    with tempfile.TemporaryDirectory(prefix="fork-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(WORKERS, f"{folder}/orders")
        patch.setattr(Node, "__init__", beginning)
        orders, process = _start(["workers"], {"OMP_NUM_THREADS": "1"})
        assert orders.recv(1), "it did not start"
        yield
        orders.close()
        process.wait(60)


# ------------------------------------------------------------------ in that process


def serve(orders: socket.socket, listener: socket.socket | None = None) -> dict[str, Any] | None:
    """Fork for every order, and say how the forks end; returns in a fork, with its order, and when there are no more."""
    running: dict[int, tuple[int, int | None]] = {}
    with selectors.DefaultSelector() as waiting:
        for source in filter(None, (orders, listener)):
            waiting.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fd in running:
                    pid, status = running.pop(key.fd)
                    waiting.unregister(key.fd)
                    _, code = os.waitpid(pid, 0)
                    os.close(key.fd)
                    _tell(status, os.waitstatus_to_exitcode(code))
                    _close(status)
                    continue
                source = orders if key.fileobj is orders else listener.accept()[0]
                text, ends, *_ = socket.recv_fds(source, MOST, 3)
                if source is not orders:
                    source.close()
                if not text and source is orders:
                    return None
                if not text:
                    continue  # whoever was to order was killed before it could
                if (pid := os.fork()) == 0:
                    os.dup2(ends[0], 1)
                    os.dup2(ends[1], 2)
                    _close(*ends, *running, *(status for _, status in running.values()))
                    return json.loads(text)
                _close(*ends[:2])
                status = ends[2] if len(ends) > 2 else None
                _tell(status, pid)
                handle = os.pidfd_open(pid)
                running[handle] = (pid, status)
                waiting.register(handle, selectors.EVENT_READ)


def _tell(end: int | None, number: int) -> None:
    """Say a number to whoever has ordered, if somebody listens."""
    if end is not None:
        with suppress(BrokenPipeError):
            os.write(end, f"{number}\n".encode())


def _close(*ends: int | None) -> None:
    for end in ends:
        if end is not None:
            os.close(end)


def carry_out(order: dict[str, Any]) -> None:
    """Do what `python script arguments` does from here on."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["directory"])
    sys.argv = order["arguments"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    sys.path[1:2] = [path for path in order["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    runpy.run_path(sys.argv[0], run_name="__main__")


def hand_on() -> None:
    """Order a worker of Ray with this process's arguments, environment and output."""
    script = f"{os.path.dirname(find_spec('ray').origin)}/_private/workers/default_worker.py"
    order = {"arguments": [script, *sys.argv[1:]], "environment": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[WORKERS])
        socket.send_fds(server, [json.dumps(order).encode()], [1, 2])


def main(kind: str | None) -> None:
    """Take orders, and carry out one in a fork."""
    import laplace_dist.cli  # noqa: F401  which is what jobs import

    orders, listener = socket.socket(fileno=os.dup(0)), None
    if kind == "workers":
        import laplace_dist.execution.worker  # noqa: F401  but not Ray, which reads the environment when it is loaded

        assert "ray" not in sys.modules
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(os.environ[WORKERS])
        listener.listen(64)
        orders.send(b"!")
    assert threading.active_count() == 1, "what is forked has one thread"
    order = serve(orders, listener)
    for source in filter(None, (orders, listener)):
        source.close()
    if order is not None:
        carry_out(order)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        hand_on()
    else:
        main(*sys.argv[1:] or [None])
