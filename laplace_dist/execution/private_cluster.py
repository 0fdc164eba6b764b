"""A Ray cluster of this job's own, in a process beside it: a start that hangs can be ended, and an end leaves nothing."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from laplace_dist.errors import RunFailed
from laplace_dist.execution import head
from laplace_dist.execution.timeouts import START_SECONDS

HINT_SECONDS = 20.0  # until a line says that the start takes long
# Ray's switch for systems on which a cluster has one machine: whatever it starts listens on loopback alone.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
TAIL = 400  # characters of what the process wrote that are shown if it failed


class PrivateCluster:
    """A cluster on this machine that ends with this process, whatever ends that. It comes to life in the background.

    Args:
        arguments: Of `ray.init`.
        say: Where lines for people go.
        command: What is started; for tests.
    """

    def __init__(self, arguments: dict[str, Any], say: Callable[[str], None], command: list[str] | None = None) -> None:
        self._say = say
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        # A session of its own: Ctrl-C in a terminal reaches all of a session's foreground processes, and this one is to
        # end after the workers have.
        self._process = subprocess.Popen(
            [*(command or [sys.executable, "-P", head.__file__]), json.dumps(arguments)],
            env={**os.environ, LOOPBACK: "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def address(self) -> str:
        """Return `host:port` of the cluster's head, once it is there.

        Raises:
            RunFailed: It did not start, or not in time.
        """
        hint = min(HINT_SECONDS, START_SECONDS / 2)
        if not self._answers_within(hint):
            self._say(f"Ray: still starting after {hint:g} s; this is given up after {START_SECONDS:g} s")
            if not self._answers_within(START_SECONDS - hint):
                self._process.kill()  # it may not see that its input ends; Ray's processes end with it
                raise RunFailed(
                    f"Ray: the private cluster did not start within {START_SECONDS:g} s, and was ended. {_WAYS_OUT}"
                )
        address = self._process.stdout.readline().strip()
        if not address:
            status = self._process.wait()
            raise RunFailed(f"Ray: the private cluster did not start (status {status}){self._tail()}. {_WAYS_OUT}")
        return address

    def _answers_within(self, seconds: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def _tail(self) -> str:
        self._log.seek(0)
        text = " ".join(self._log.read().split())
        return f"; it wrote: …{text[-TAIL:].rstrip('.')}" if text else ""

    def close(self) -> None:
        """End the cluster, also in the middle of its start."""
        self._process.stdin.close()
        try:
            self._process.wait(head.END_SECONDS + 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> PrivateCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_WAYS_OUT = (
    "Run the same command again when the machine has less to do; or start a cluster with `ray start --head` and give its "
    "address (--ray-address); or do without Ray (--ray-address inline)."
)
