"""The process that a private cluster lives in: it is started as a script, by its path, and imports nothing of this package.

    python head.py '{"num_cpus": 4, ...}'       the arguments of `ray.init`

It writes the address of the cluster's head as its only line, and ends with everything that it started when its standard
input does: when the job closes it, or is gone, however that came about. If this process is killed too, the kernel ends Ray's
processes, as Ray has asked it to.
"""

from __future__ import annotations

import json
import os
import sys
import threading

END_SECONDS = 8.0  # for Ray to end in order; it takes one or two


def _watch(ready: threading.Event, over: threading.Event) -> None:
    sys.stdin.buffer.read()
    if not ready.is_set():
        os._exit(1)
    over.set()


def main(arguments: str) -> None:
    """Start a cluster and keep it until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    ready, over = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(ready, over), daemon=True).start()
    import ray

    context = ray.init("local", log_to_driver=False, logging_level="error", **json.loads(arguments))
    ready.set()
    print(context.address_info["gcs_address"], file=answers, flush=True)
    over.wait()
    last = threading.Timer(END_SECONDS, os._exit, [1])
    last.daemon = True
    last.start()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
