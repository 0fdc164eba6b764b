"""What every process of a job's private cluster takes of the processors during a map phase, and what two processes can gain."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
LEAST = 0.05  # seconds from which a process is shown
KINDS = {"gcs_server": "Ray's head (gcs_server)", "raylet/raylet": "Ray's scheduler (raylet)"}


def of_map(examples: int, workers: int) -> list[str]:
    """Return the lines of a table: the map phase of `benchmarks/map_phase.py`, from its first task to its last commit."""
    import map_phase

    from laplace_dist.config.settings import Config
    from laplace_dist.job import Job

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model="map_phase:network", data="map_phase:examples", data_args={"n": examples}, checkpoint=f"{folder}/run",
            batch_size=map_phase.BATCH, num_workers=workers, ray_address="local",
        )  # fmt: skip
        with Job(config, say=lambda text: None) as job:
            job.open()
            job.session.executor.connect()
            before, begun = _spent(), time.perf_counter()
            job.map()
            seconds, after = time.perf_counter() - begun, _spent()
    rows = []
    for process, (name, user, kernel) in sorted(after.items(), key=lambda item: -sum(item[1][1:])):
        _, user_before, kernel_before = before.get(process, (name, 0.0, 0.0))
        user, kernel = user - user_before, kernel - kernel_before
        if user + kernel >= LEAST:
            rows.append(f"| {name} | {user:.2f} s | {kernel:.2f} s |")
    return [
        f"{examples:,} images, {workers} workers of one thread, {seconds:.1f} s by the clock; less than {LEAST} s is left out.",
        "",
        "| process | itself | kernel |",
        "| --- | --- | --- |",
        *rows,
    ]


def side_by_side(examples: int) -> list[str]:
    """Return the line that says what a plain `la.fit` takes alone and beside another: what the machine itself leaves of 2 ×."""
    import map_phase

    with ThreadPoolExecutor(2) as pool:
        alone, two = map_phase.bare(examples), list(pool.map(map_phase.bare, [examples] * 2))
    beside = " and ".join(f"{seconds:.1f}" for seconds in two)
    return [
        f"la.fit of {examples:,} images by one thread takes {alone:.1f} s alone, and {beside} s beside another process of its "
        f"kind: two processes do {2 * alone / max(two):.2f} × the work of one."
    ]


def _spent() -> dict[int, tuple[str, float, float]]:
    """Return name and CPU seconds of this process and of all below it."""
    found: dict[int, tuple[int, str, float, float]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            found |= _of_process(folder)
    return {process: found[process][1:] for process in _below(os.getpid(), found)}


def _of_process(folder: Path) -> dict[int, tuple[int, str, float, float]]:
    try:
        line, command = (folder / "stat").read_text(), (folder / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:  # it has ended
        return {}
    fields = line.rpartition(")")[2].split()
    name = next((name for pattern, name in KINDS.items() if pattern in command), None) or _short(command)
    name = "driver" if int(folder.name) == os.getpid() else name
    return {int(folder.name): (int(fields[1]), name, int(fields[11]) / TICKS, int(fields[12]) / TICKS)}


def _short(command: str) -> str:
    """Return a worker's title, or the name of the script that a process runs."""
    words = command.split() or ["?"]
    return next((word.rpartition("/")[2] for word in words if word.endswith(".py")), words[0].rpartition("/")[2])


def _below(process: int, found: dict[int, tuple[int, str, float, float]]) -> Iterator[int]:
    yield process
    for other, (parent, *_) in found.items():
        if parent == process:
            yield from _below(other, found)
