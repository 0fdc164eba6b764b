"""Faults at exact places of real driver and worker processes, and what tests ask of a run after them.

The data set's import path brings the faults into each process: building a split wraps a few methods there. Nothing of
this is in the library. A fault fires once per folder, whichever process is first, and leaves a note `fired-<name>`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import Event
from typing import Any

import dist_cases
import torch
from forked import Forked

import laplace_dist
from laplace_dist.report.progress import Progress
from laplace_dist.run import lifecycle, versions
from laplace_dist.run.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
_METHODS = {
    "create": Checkpoint,
    "replace": Checkpoint,
    "write_arrays": Checkpoint,
    "_put": Checkpoint,
    "done": Progress,
}
_installed = False


# ------------------------------------------------------------------ in the processes of a run


class Faulty(dist_cases.Watched):
    """The examples of `dist_cases.blobs`; notes which ones workers read, of every split, and installs the faults."""

    def __init__(self, split: str, folder: str, faults: list[dict[str, Any]] = (), beside: bool = False) -> None:
        super().__init__(split, folder, beside=beside)
        self.watch, self.prefix = True, "reads" if split == "train" else f"{split}-reads"
        install(Path(folder), faults)

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        if dist_cases.in_worker() and not dist_cases.only_compared():
            with open(self.folder / f"{self.prefix}-{os.getpid()}", "a") as file:
                file.write(f"{index}\n")
        return self.x[index], self.y[index]


def fault(where: str, method: str, key: str, when: str = "before", act: str = "kill") -> dict[str, str]:
    """Return a fault.

    Args:
        where: `worker` or `driver`.
        method: Of `Checkpoint`, or `done` of `Progress`, whose key is `<stage>/<count before the call>`.
        key: Regular expression for its first argument.
        when: `before` or `after` the method's effect, or in the `middle` of `_put`, with half of the bytes written.
        act: A function below.
    """
    name = re.sub(r"\W+", "-", f"{where} {act} {when} {method} {key}")
    return {"name": name, "where": where, "method": method, "key": key, "when": when, "act": act}


def install(folder: Path, faults: list[dict[str, Any]]) -> None:
    """Wrap the methods of this process, once."""
    global _installed
    if _installed:
        return
    _installed = True
    here = "worker" if dist_cases.in_worker() else "driver"
    for method in {chosen["method"] for chosen in faults if chosen["where"] == here}:
        mine = [chosen for chosen in faults if (chosen["where"], chosen["method"]) == (here, method)]
        setattr(_METHODS[method], method, _wrapped(getattr(_METHODS[method], method), folder, mine))


def _wrapped(original, folder: Path, faults: list[dict[str, Any]]):
    @wraps(original)
    def method(self, key, *args):
        label = f"{self.stage}/{self.count}" if isinstance(self, Progress) else key
        due = [chosen for chosen in faults if re.fullmatch(chosen["key"], label)]

        def fire(when, prepare=lambda: None):
            for chosen in due:
                if chosen["when"] == when and _note(folder, chosen, label, args):
                    prepare()
                    globals()[chosen["act"]](folder, label)

        fire("before")
        fire("middle", lambda: original(self, key, args[0][: len(args[0]) // 2]))
        result = original(self, key, *args)
        fire("after")
        return result

    return method


def _note(folder: Path, chosen: dict[str, Any], label: str, args: tuple) -> bool:
    """Leave the note that a fault fires; returns False if it has fired and fires only once."""
    name = chosen["name"] if chosen["act"] in ONCE else f"{chosen['name']}-{os.getpid()}-{label.replace('/', '-')}"
    data = args[0].decode(errors="replace") if args and isinstance(args[0], bytes) else None
    try:
        with open(folder / f"fired-{name}", "x") as file:
            file.write(json.dumps({"pid": os.getpid(), "key": label, "data": data}))
    except FileExistsError:
        return chosen["act"] not in ONCE
    return True


ONCE = ("kill", "stop", "exhaust", "eat")


def kill(folder: Path, label: str) -> None:
    """Die at once, as from the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(folder: Path, label: str) -> None:
    """Hang for good, in all threads."""
    os.kill(os.getpid(), signal.SIGSTOP)


def exhaust(folder: Path, label: str) -> None:
    """Ask for more memory than there is."""
    torch.empty(2**50)


def eat(folder: Path, label: str) -> None:
    """Take 6 GB, piece by piece, and hold them until somebody ends this process; give them back after a minute."""
    held = [torch.ones(2**24) for _ in range(96)]
    Event().wait(60)
    held.clear()


def meet(folder: Path, label: str) -> None:
    """Wait until a second process has come as far with the same key."""
    place = folder / f"meet-{label.replace('/', '-')}"
    place.mkdir(exist_ok=True)
    (place / str(os.getpid())).touch()
    end = time.monotonic() + 120
    while len(list(place.iterdir())) < 2:
        assert time.monotonic() < end, f"nobody else came to {label}"
        time.sleep(0.001)


def jump(folder: Path, label: str) -> None:
    """Set this process's clock back by an hour, and by another one each time."""
    before = time.time
    time.time = lambda: before() - 3600


# ------------------------------------------------------------------ in the test


def fired(folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the note of a fault; there is none if it did not fire."""
    return json.loads((folder / f"fired-{chosen['name']}").read_text())


def config(url, folder: Path, faults=(), beside=False, **changes):
    data_args = {"folder": str(folder), "faults": list(faults), "beside": beside}
    return dist_cases.config(url, data="fault_cases:Faulty", data_args=data_args, **changes)


def start_job(settings: Path, environment, script: str = "fit_kron", **changes) -> Forked:
    """Start a job as a process of its own, in the repository's root.

    Args:
        settings: Where its configuration file goes.
        environment: Of the process.
        script: Name of the job.
        changes: `chosen`, a Config; and what differs from it, by field name.
    """
    chosen = changes.pop("chosen")
    values = {**chosen.model_dump(exclude_none=True), "storage_options": chosen.storage_options, **changes}
    settings.write_text(json.dumps(values))
    return Forked(ROOT / "jobs" / f"{script}.py", [f"--config={settings}"], environment)


def reads(folder: Path, split: str = "train") -> Counter:
    """Return how often workers read each example of a split; of 0, which also shows the shapes, nothing is said."""
    prefix = "reads" if split == "train" else f"{split}-reads"
    found = Counter(int(line) for path in folder.glob(f"{prefix}-*") for line in path.read_text().split())
    return Counter({index: count for index, count in found.items() if index > 0})


def readers(folder: Path, index: int) -> set[int]:
    """Return the processes that read a training example."""
    return {int(p.name.split("-")[1]) for p in folder.glob("reads-*") if str(index) in p.read_text().split()}


def wait_until_gone(pid: int, seconds: float = 60.0) -> None:
    """Wait until a process has ended, whether or not its parent has noticed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state in "ZX":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} still lives after {seconds} s")


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Do something while no other process of this machine does the same."""
    with open(Path(tempfile.gettempdir()) / f"laplace-dist-tests-{name}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when it is closed
        yield


def manifests(store: Checkpoint) -> dict[str, bytes]:
    """Return the manifests of the committed segments.

    They are created once, so they stay the same even if a segment is done again: `reads` says whether it was.
    """
    return {key: store.read(key) for key in store.list("partials", recursive=False) if key.endswith(".json")}


def factors(store: Checkpoint) -> tuple[str, dict[str, bytes]]:
    """Return the current version and the decoded bytes of its factors."""
    plan = lifecycle.read_plan(store)
    version = json.loads(store.read("CURRENT.json"))["version"]
    places = versions.read_version(store, plan, version)["factors"]
    return version, {n: store.read_array(place["prefix"], n, place["entry"]).tobytes() for n, place in places.items()}


def outcome(store: Checkpoint) -> dict[str, Any]:
    """Return all that a run's user gets: the factors, the tuned prior and the metrics."""
    current = json.loads(store.read("CURRENT.json"))
    tuned = json.loads(store.read(current["tuning"])) if current["tuning"] else None
    if tuned is not None:
        arrays, prefix = tuned["arrays"], tuned["prefix"]
        tuned = {name: store.read_array(prefix, name, entry).tobytes() for name, entry in arrays.items()}
    metrics = json.loads(store.read("evaluation/metrics.json")) if store.exists("evaluation/metrics.json") else None
    return {"factors": factors(store), "tuned": tuned, "metrics": metrics}


def orphans(store: Checkpoint) -> set[str]:
    """Return the segments and versions with attempts that nothing names, after asserting that the rest is whole."""
    report = laplace_dist.verify(store.url, store._options)
    assert report.problems == []
    return {"/".join(place.split("/")[:2]) for place in report.orphans}
