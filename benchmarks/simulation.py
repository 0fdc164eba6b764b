"""How a run ends on machines that are preempted: the loop alone, over simulated workers, on a clock that is not the wall's.

    python benchmarks/simulation.py

Each row: 20 runs of 4,096 segments of a minute on 100 workers, whose attempts are preempted with the probability given.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from laplace_dist.errors import RunFailed
from laplace_dist.execution.loop import run_tasks
from laplace_dist.testing.simulated_pool import SimulatedPool

PROBABILITIES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Segment:
    """A task that only has a name."""

    what: str


def run(probability: float, seed: int, segments: int, workers: int, start: float) -> float | None:
    """Return the time that a run took in units of the ideal, or None if it failed."""
    pool = SimulatedPool(workers, probability, seed, start=start)
    try:
        run_tasks(pool, (Segment(f"segment {i}") for i in range(segments)), lambda task, receipt: None)
    except RunFailed:
        return None
    return pool.now / pool.ideal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segments", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--start", type=float, default=0.0, help="seconds until a lost worker is replaced")
    given = parser.parse_args()
    print("| p | finished | makespan / ideal, median | worst |\n| --- | --- | --- | --- |")
    for p in PROBABILITIES:
        times = [run(p, seed, given.segments, given.workers, given.start) for seed in range(given.seeds)]
        done = [time for time in times if time is not None]
        shown = f"{statistics.median(done):.3f} | {max(done):.3f}" if done else "- | -"
        print(f"| {p:.2f} | {len(done)} of {given.seeds} | {shown} |")


if __name__ == "__main__":
    main()
