"""One fit that is disturbed by random faults: what happens to it, and what is found afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"worker": 8, "node": 2, "silence": 1, "driver": 1, "s3": 1}  # and how often each, beside the others
SIZE = 4  # examples per segment


# ------------------------------------------------------------------ what is fitted


def network() -> nn.Module:
    """A small network with fixed weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def only_compared() -> bool:
    """Say whether this process reads an example just now to compare data sets, and not to add it to a sum."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals["__name__"] == "laplace_dist.plan.identity" or frame.f_code.co_qualname == "CompareData.run":
            return True
        frame = frame.f_back
    return False


class Slow(Dataset):
    """Random examples that take a fixed time to read; workers leave notes of the segments that they begin.

    Args:
        split: All are the same.
        folder: Where the notes go.
        segments: How many there are.
        seconds: How long a worker reads one of them.
    """

    def __init__(self, split: str, folder: str, segments: int, seconds: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(segments * SIZE, 12, generator=generator)
        self.y = torch.randint(0, 3, (segments * SIZE,), generator=generator)
        self.folder, self.pause = Path(folder), seconds / SIZE
        self.here = os.path.basename(sys.argv[0]) == "default_worker.py"
        self.started = False

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.here and self.started and not only_compared():  # the first reading only shows the shapes
            if index % SIZE == 0:
                with open(self.folder / f"begun-{os.getpid()}", "a") as file:
                    file.write(f"{index // SIZE}\n")
            time.sleep(self.pause)
        self.started = True
        return self.x[index], self.y[index]


# ------------------------------------------------------------------ the soak


@dataclass
class Report:
    """What a soak found.

    Attributes:
        faults: How many of each kind the run survived.
        noticed: Seconds from the death of a worker, or of a worker's node, to the line about it in the driver's log; also
            where the node only fell silent, so that no closed connection tells of it.
        segments: Segments of the plan.
        recomputed: Segments that were begun again, counted each time.
        bytes_lost: Stored bytes of committed partials that later were missing or others, 0 if nothing is wrong.
        problems: What a verification of every object found, and differences from the undisturbed run.
        failures: Times that the job gave up, with its message, and was started again.
        seconds: Wall time of the disturbed run.
        undisturbed_seconds: Wall time of the other one, None if it was not timed.
    """

    faults: Counter[str] = field(default_factory=Counter)
    noticed: dict[str, list[float]] = field(default_factory=lambda: {"worker": [], "node": [], "silence": []})
    segments: int = 0
    recomputed: int = 0
    bytes_lost: int = 0
    problems: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    undisturbed_seconds: float | None = None

    def lines(self) -> list[str]:
        """Return the report for people."""
        noticed = {
            kind: f"median {statistics.median(times):.2f} s, at most {max(times):.2f} s, of {len(times)}"
            for kind, times in self.noticed.items()
            if times
        }
        other = self.undisturbed_seconds
        ratio = f", {self.seconds / other:.2f} times the undisturbed run's {other:.0f} s" if other else ""
        return [
            f"faults survived      {self.faults.total()}: {', '.join(f'{n} {kind}' for kind, n in self.faults.items())}",
            *(f"{kind + ' noticed after':<20} {text}" for kind, text in noticed.items()),
            f"segments             {self.segments}, of which {self.recomputed} were begun again",
            f"bytes lost           {self.bytes_lost}",
            f"problems             {'; '.join(self.problems) or 'none: every object is whole, every bit is the same'}",
            f"job gave up          {len(self.failures)} times{''.join(f'{chr(10)}    {text}' for text in self.failures)}",
            f"wall time            {self.seconds:.0f} s{ratio}",
        ]


class Soak:
    """One disturbed run.

    Args:
        server: An S3 server as `tests/dist/s3server.py` has it.
        nodes: A cluster as `tests/dist/node_cluster.py` has it.
        folder: Of notes and logs.
        environment: Of the job.
        segments: How many.
        seconds: Of each.
        seed: Of the faults.
        every: Shortest and longest time between two faults in seconds.
    """

    def __init__(
        self,
        server: Any,
        nodes: Any,
        folder: Path,
        environment: dict[str, str],
        *,
        workers: int = 3,
        segments: int = 600,
        seconds: float = 2.0,
        seed: int = 0,
        every: tuple[float, float] = (5.0, 15.0),
    ) -> None:
        self.server, self.nodes, self.folder, self.environment = server, nodes, folder, environment
        self.workers, self.segments, self.seconds, self.every = workers, segments, seconds, every
        self.random = random.Random(seed)
        self.report = Report(segments=segments)
        self.seen: dict[str, bytes] = {}
        self.former: set[int] = set()  # workers that the driver no longer knows, although they may still live
        self.log, self.job = folder / "job.log", None

    def settings(self, url: str, notes: Path) -> dict[str, Any]:
        """Return the job's settings."""
        notes.mkdir()
        data_args = {"folder": str(notes), "segments": self.segments, "seconds": self.seconds}
        return {
            "model": "soak:network", "data": "soak:Slow", "data-args": data_args, "batch-size": SIZE,
            "segment-size": SIZE, "num-workers": self.workers, "gpus-per-worker": 0.0, "checkpoint": url,
            "storage-options": self.server.options, "ray-address": self.nodes.address, "skip-tune": True,
            "skip-evaluate": True,
        }  # fmt: skip

    def undisturbed(self) -> dict[str, str]:
        """Run without faults; returns what `result` does."""
        url, begun = self.server.url(), time.monotonic()
        self.start(self.settings(url, self.folder / "undisturbed"))
        assert self.job.wait() == 0, self.log.read_text()
        self.report.undisturbed_seconds = time.monotonic() - begun
        return self.result(url)

    def run(self, minutes: float, least: tuple[str, ...] = ()) -> dict[str, str]:
        """Run with faults for some minutes, or until the run is done; returns what `result` does.

        Args:
            minutes: After these no more faults happen but those of `least`.
            least: Kinds to begin with, in this order.
        """
        notes, url, begun = self.folder / "disturbed", self.server.url(), time.monotonic()
        settings = self.settings(url, notes)
        self.start(settings)
        order, at = list(least), begun + self.random.uniform(*self.every)
        while (status := self.job.poll()) != 0:
            if status is not None:
                self.report.failures.append(self.log.read_text().strip().splitlines()[-1])
                assert len(self.report.failures) < 5, self.report.failures
                self.start(settings)
            now = time.monotonic()
            if now > at and (order or now - begun < 60 * minutes) and (worker := self.busy(notes)):
                kind = order.pop(0) if order else self.random.choices(list(KINDS), list(KINDS.values()))[0]
                self.remember(url)
                if getattr(self, f"lose_{kind}")(worker, settings):
                    self.report.faults[kind] += 1
                elif least:
                    order.insert(0, kind)
                at = time.monotonic() + self.random.uniform(*self.every)
            time.sleep(0.05)
        self.report.seconds = time.monotonic() - begun
        begun_segments = Counter(int(n) for path in notes.glob("begun-*") for n in path.read_text().split())
        self.report.recomputed = sum(times - 1 for times in begun_segments.values())
        return self.result(url)

    # -------------------------------------------------------------- faults; each says whether it happened

    def lose_worker(self, worker: int, _: dict[str, Any]) -> bool:
        """Kill a worker that is inside a segment."""
        before, begun = self.deaths(), time.monotonic()
        try:
            os.kill(worker, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.notice("worker", before, begun)
        return True

    def lose_node(self, worker: int, _: dict[str, Any]) -> bool:
        """Kill every process of the worker's node at once, and let another node join."""
        before, begun = self.deaths(), time.monotonic()
        if "none" in self.nodes.ask(f"lose {worker}"):
            return False
        self.notice("node", before, begun)
        self.nodes.ask("add")
        return True

    def lose_silence(self, worker: int, _: dict[str, Any]) -> bool:
        """Stop every process of the worker's node; when it was given up and replaced, let it go on as if nothing was."""
        before, begun = self.deaths(), time.monotonic()
        if "none" in self.nodes.ask(f"mute {worker}"):
            return False
        self.former.add(worker)
        self.notice("silence", before, begun)
        self.nodes.ask("add")
        self.nodes.ask("wake")
        return True

    def lose_driver(self, _: int, settings: dict[str, Any]) -> bool:
        """Kill the driver and give the same command again."""
        notes = Path(settings["data-args"]["folder"])
        self.former |= {int(path.name.removeprefix("begun-")) for path in notes.glob("begun-*")}
        self.job.kill()
        self.job.wait()
        self.start(settings)
        return True

    def lose_s3(self, *_: Any) -> bool:
        """Kill the S3 server and start it again after a while."""
        self.server.stop()
        time.sleep(self.random.uniform(1.0, 10.0))
        self.server.start()
        return True

    # -------------------------------------------------------------- helpers

    def start(self, settings: dict[str, Any]) -> None:
        """Start the job as a process of its own."""
        path = self.folder / "settings.json"
        path.write_text(json.dumps(settings))
        command = [sys.executable, str(ROOT / "jobs" / "fit_kron.py"), f"--config={path}"]
        with open(self.log, "a") as log:
            self.job = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def busy(self, notes: Path) -> int | None:
        """Return a worker that lives and has begun a segment; it is inside one, but for the moment of a commit."""
        pids = [int(path.name.removeprefix("begun-")) for path in notes.glob("begun-*")]
        living = sorted(pid for pid in pids if pid not in self.former and _lives(pid))
        return self.random.choice(living) if living else None

    def deaths(self) -> int:
        """Return how many deaths the driver has noticed."""
        text = self.log.read_text()
        return text.count("process died, and its node lives on") + text.count("its node was lost")

    def notice(self, kind: str, before: int, begun: float) -> None:
        """Wait until the driver has noticed a death; not when the driver or the storage keep it from doing so."""
        while time.monotonic() < begun + 60 and self.job.poll() is None:
            if self.deaths() > before:
                self.report.noticed[kind].append(time.monotonic() - begun)
                return
            time.sleep(0.01)

    def remember(self, url: str) -> None:
        """Keep the manifests of what is committed by now, and compare with what was."""
        from laplace_dist.run.checkpoint import Checkpoint

        store = Checkpoint(url, self.server.options)
        keys = [key for key in store.list("partials", recursive=False) if key.endswith(".json")]
        now = dict(store.read_many(keys))
        for key, data in self.seen.items():
            if now.get(key) != data:
                self.report.bytes_lost += sum(e["stored_bytes"] for e in json.loads(data)["arrays"].values())
                self.report.problems.append(f"{key} was committed and is {'another' if key in now else 'gone'}")
        self.seen = now

    def result(self, url: str) -> dict[str, str]:
        """Verify every object of a run and return the version and the digest of every factor."""
        from laplace_dist import verify
        from laplace_dist.run.checkpoint import Checkpoint

        if self.seen:
            self.remember(url)
        store = Checkpoint(url, self.server.options)
        checked = verify(url, self.server.options)
        self.report.problems += [f"{key}: {text}" for key, text in checked.problems]
        if checked.committed != self.segments:
            self.report.problems.append(f"{checked.committed} of {self.segments} segments are committed")
        return digests(store)

    def compare(self, wanted: dict[str, str], found: dict[str, str]) -> None:
        """Add to the problems what differs from the undisturbed run."""
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        self.report.problems += [f"{name} differs from the undisturbed run" for name in different]


def digests(store: Any) -> dict[str, str]:
    """Return the name of a run's current version and the sha256 of every factor in it."""
    from laplace_dist.run import layout, lifecycle, versions

    version = json.loads(store.read(layout.CURRENT))["version"]
    factors = versions.read_version(store, lifecycle.read_plan(store), version)["factors"]
    return {"version": version, **{name: place["entry"]["sha256"] for name, place in factors.items()}}


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
