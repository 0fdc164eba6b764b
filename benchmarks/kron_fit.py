"""Exact-GGN Kron fit of an MLP 784-1024-1024-10 against laplace-torch, side by side.

    python benchmarks/kron_fit.py --peer-python PATH/TO/PEER/ENV/bin/python

The peer's environment holds laplace-torch 0.3 with asdfghjkl 0.1a4. The two libraries take turns, so that a drift of the
machine's speed meets both; each turn is a process of its own with two threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def turn(python: str, which: str, backends: list[str], runs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run of every backend in one process."""
    command = [python, "-W", "ignore", str(_HERE / "peer_kron.py"), "--which", which, "--runs", str(runs)]
    environment = {"PYTHONPATH": str(_HERE.parent)} if which == "ours" else {}
    output = subprocess.run(
        [*command, "--backends", *backends], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Print the table of medians and the paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _ in range(arguments.turns):
        for which, python, backends in (
            ("ours", sys.executable, ["native", "curvlinops"]),
            ("theirs", arguments.peer_python, ["curvlinops", "asdl", "backpack"]),
        ):
            for name, seconds in turn(python, which, backends, 2).items():
                for what, values in seconds.items():
                    times.setdefault((which, name), {}).setdefault(what, []).append(statistics.median(values))
    for (which, name), measured in times.items():
        row = "  ".join(f"{what} {statistics.median(v):6.2f} s" for what, v in measured.items())
        print(f"{'this library' if which == 'ours' else 'laplace-torch'} / {name:<11} {row}")
    for what in ("fit", "fit+evidence"):
        best = [min(m[what][i] for (w, _), m in times.items() if w == "theirs") for i in range(arguments.turns)]
        ratios = [b / o for b, o in zip(best, times["ours", "native"][what], strict=True)]
        print(
            f"{what}: fastest peer / native = {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
