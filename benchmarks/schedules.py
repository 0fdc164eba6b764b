"""Whole runs under seeded schedules: thousands of ways in which drivers, workers, readers and the store may meet.

    python benchmarks/schedules.py --seeds 2000
    python benchmarks/schedules.py --show 17          # one seed step by step

Each seed is one schedule of `tests/dist/simulation.py`; two processes share them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "dist")]

from simulation import Outcome, simulate  # noqa: E402


def _without_trace(seed: int) -> Outcome:
    outcome = simulate(seed)
    outcome.trace.clear()
    return outcome


def show(seed: int) -> None:
    """Print a schedule step by step."""
    outcome = simulate(seed)
    print("\n".join(outcome.trace), *outcome.failures, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", type=int)
    given = parser.parse_args()
    if given.show is not None:
        show(given.show)
        return
    begun, fired, steps, failed = time.monotonic(), Counter(), 0, []
    with ProcessPoolExecutor(given.processes) as pool:
        for outcome in pool.map(_without_trace, range(given.first, given.first + given.seeds), chunksize=10):
            fired, steps = fired + outcome.fired, steps + outcome.steps
            if outcome.failures:
                failed.append(outcome.seed)
                print(f"seed {outcome.seed}: {outcome.failures[0]}", flush=True)
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{given.seeds} schedules, {steps} steps, {given.seeds / minutes:.0f} schedules a minute, {len(failed)} failed"
    )
    for name, count in sorted(fired.items()):
        print(f"{count:8d}  {name}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
