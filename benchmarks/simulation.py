"""How a run ends on machines that are preempted: the loop alone, over simulated workers, on a clock that is not the wall's.

    python benchmarks/simulation.py

Each row: 20 runs of 4,096 segments of a minute on 100 workers, whose attempts are preempted with the probability given.

    python benchmarks/simulation.py --segments 100000 --workers 1000 --seeds 1 --stragglers 0.01

The last columns are the driver's processor time per segment, with the simulation's own, and its peak memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import dataclass

from laplace_dist.errors import RunFailed
from laplace_dist.execution.loop import run_tasks
from laplace_dist.testing.simulated_pool import SimulatedPool

PROBABILITIES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Segment:
    """A task that only has a name."""

    what: str


def run(probability: float, seed: int, given: argparse.Namespace) -> float | None:
    """Return the time that a run took in units of the ideal, or None if it failed."""
    pool = SimulatedPool(given.workers, probability, seed, start=given.start, stragglers=given.stragglers)
    tasks = (Segment(f"segment {i}") for i in range(given.segments))
    try:
        run_tasks(pool, tasks, lambda task, receipt: None, clock=lambda: pool.now)
    except RunFailed:
        return None
    return pool.now / pool.ideal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segments", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--start", type=float, default=0.0, help="seconds until a lost worker is replaced")
    parser.add_argument(
        "--stragglers", type=float, default=0.0, help="probability that an attempt takes ten times as long"
    )
    given = parser.parse_args()
    print("| p | finished | makespan / ideal, median | worst | CPU per segment | memory |\n| --- " + "| --- " * 5 + "|")
    for p in PROBABILITIES:
        begun = time.process_time()
        times = [run(p, seed, given) for seed in range(given.seeds)]
        each = (time.process_time() - begun) / given.seeds / given.segments
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        done = [found for found in times if found is not None]
        shown = f"{statistics.median(done):.3f} | {max(done):.3f}" if done else "- | -"
        print(f"| {p:.2f} | {len(done)} of {given.seeds} | {shown} | {each * 1e3:.3f} ms | {peak:.0f} MB |")


if __name__ == "__main__":
    main()
