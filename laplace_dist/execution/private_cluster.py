"""A Ray cluster of this job's own, in a process beside it: a start that hangs can be ended, and an end leaves nothing."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from laplace_dist.errors import RunFailed
from laplace_dist.execution import head
from laplace_dist.execution.timeouts import START_SECONDS

HINT_SECONDS = 20.0  # until a line says that the start takes long
TAIL = 400  # characters of what the process wrote that are shown if it failed


class PrivateCluster:
    """A cluster on this machine that ends with this process, whatever ends that.

    Args:
        arguments: Of `ray.init`.
        say: Where lines for people go.
        command: What is started; for tests.

    Attributes:
        address: `host:port` of its head.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        say: Callable[[str], None],
        command: list[str] | None = None,
    ) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        # A session of its own: Ctrl-C in a terminal reaches all of a session's foreground processes, and this one is to
        # end after the workers have.
        self._process = subprocess.Popen(
            [*(command or [sys.executable, "-P", str(Path(head.__file__))]), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        with ExitStack() as stack:
            stack.callback(self.close, at_once=True)  # nothing is to stay behind, whatever ends the start
            self.address = self._answer(say)
            stack.pop_all()

    def _answer(self, say: Callable[[str], None]) -> str:
        end = time.monotonic() + START_SECONDS
        hint = min(HINT_SECONDS, START_SECONDS / 2)
        if not select.select([self._process.stdout], [], [], hint)[0]:
            say(f"Ray: still starting after {hint:g} s; this is given up after {START_SECONDS:g} s")
        if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise RunFailed(
                f"Ray: the private cluster did not start within {START_SECONDS:g} s, and was ended. {_WAYS_OUT}"
            )
        address = self._process.stdout.readline().strip()
        if not address:
            status = self._process.wait()
            raise RunFailed(f"Ray: the private cluster did not start (status {status}){self._tail()}. {_WAYS_OUT}")
        return address

    def _tail(self) -> str:
        self._log.seek(0)
        text = " ".join(self._log.read().split())
        return f"; it wrote: …{text[-TAIL:].rstrip('.')}" if text else ""

    def close(self, at_once: bool = False) -> None:
        """End the cluster."""
        if at_once:
            self._process.kill()  # Ray's processes end with it
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
