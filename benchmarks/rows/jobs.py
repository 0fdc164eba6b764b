"""Jobs: the map phase beside a bare fit, commits, the reduction, the loop, what follows on the map, and how a job starts."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from harness import Prepare, Row, Target

HERE = Path(__file__).resolve().parents[1]
sys.path.append(str(HERE))  # whose last_layer.py is not that of the rows
os.environ["PYTHONPATH"] = f"{HERE}:{HERE.parent}"  # of workers


def _map_phase() -> Mapping[str, float]:
    import map_phase

    bare, one, two = map_phase.bare(map_phase.EXAMPLES), *(map_phase.map_phase(map_phase.EXAMPLES, n) for n in (1, 2))
    return {"ours": two, "one worker": one, "of a bare la.fit with one": one / bare}


def _processes() -> Mapping[str, list[str]]:
    import processes

    return {
        "CPU seconds by process, a tenth of the images": processes.of_map(6_000, 2),
        "two processes without Ray, a quarter of the images": processes.side_by_side(15_000),
    }


def _commits() -> Mapping[str, float]:
    import costs

    with tempfile.TemporaryDirectory() as folder:
        spent, total, _ = costs.commit_seconds(folder, {}, segments=3)
    return {"ours": spent, "of the map": spent / (total - spent)}


def _reduction() -> Mapping[str, float]:
    import reduction

    with tempfile.TemporaryDirectory() as folder:
        rounds = reduction.measured(folder)
    return {
        "ours": statistics.median(found.seconds for found in rounds),
        "of the disk's rate": statistics.median(found.share for found in rounds),
    }


def _loop() -> Mapping[str, float]:
    import simulation

    segments = 100_000
    begun = time.process_time()
    makespan = simulation.run(0.0, 0, Namespace(workers=1000, segments=segments, start=0.0, stragglers=0.01))
    assert makespan is not None, "the run failed"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ours": (time.process_time() - begun) / segments, "MB": peak, "of the ideal time": makespan}


def _follow_on(case: str) -> Mapping[str, float]:
    import follow_on

    mapped, tuned, evaluated = follow_on.measured(case)
    each = [seconds / size for seconds, size in zip((mapped, tuned, evaluated), follow_on.SIZES.values(), strict=True)]
    total = follow_on.SIZES["train"]
    return {"ours": total * (each[1] + each[2]), "map": mapped}


def _stages(case: str) -> Mapping[str, Prepare]:
    import follow_on

    follow_on.SIZES = dict.fromkeys(follow_on.SIZES, 64)
    return {name: partial(follow_on.prepared, case, name) for name in ("map", "tune", "evaluate")}


def _seconds_of(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _import() -> Mapping[str, float]:
    both = [(_seconds_of("import laplace"), _seconds_of("import torch")) for _ in range(5)]
    ours, torch = (statistics.median(times) for times in zip(*both, strict=True))
    return {"ours": ours, "of torch's own": ours / torch}


def _first_segment() -> Mapping[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        job = subprocess.Popen(
            [sys.executable, str(HERE.parent / "jobs" / "fit_kron.py"), "--checkpoint", f"{folder}/run"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
        try:
            while not any(
                Path(folder, "run").glob("**/partials/*/*")
            ):  # the attempt at a segment begins with its folder
                if job.poll() is not None:
                    raise RuntimeError(f"the job ended before its first segment:\n{job.stdout.read()}")
                time.sleep(0.01)
            return {"ours": time.perf_counter() - begun}
        finally:
            job.communicate()


ROWS = {
    "map": Row(
        "Map phase and commits, two workers of one thread (60,000)",
        _map_phase,
        (Target("one worker", 1.92, "faster"), Target("of a bare la.fit with one", 1.03, "value")),
        profiled=_processes,
    ),
    "commits": Row("Commits of three segments (23,040 images)", _commits, (Target("of the map", 0.01, "value"),)),
    "reduction": Row(
        "Reduction, ViT-B, 8 GiB of partials", _reduction, (Target("of the disk's rate", 0.6, "at least"),)
    ),
    "loop": Row(
        "Loop, each of 100,000 segments, 1,000 workers, 1 % stragglers",
        _loop,
        (Target("seconds", 0.002), Target("MB", 1000, "value"), Target("of the ideal time", 1.05, "value")),
    ),
    **{
        case: Row(
            f"Tuning and evaluation of 1,024 images, {name}",
            partial(_follow_on, case),
            (Target("map", 1),),
            profiled=partial(_stages, case),
        )
        for case, name in (
            ("resnet-diag", "ResNet-18 diag"),
            ("vit-kron", "ViT Kron"),
            ("resnet-kron-100", "ResNet-18 Kron, 100 classes"),
        )
    },
    "import": Row("Import of laplace", _import, (Target("of torch's own", 1.2, "value"),)),
    "start": Row("jobs/fit_kron.py until its first segment is written", _first_segment, ()),
}
