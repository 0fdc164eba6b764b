"""Every row of the table of speeds: this library and its peers in turns, medians, and whether the target is reached.

    python benchmarks/bench.py --peer-python PATH/TO/PEER/ENV/bin/python [FAMILY[:ROW] …] [--turns 3] [--write]
    python benchmarks/bench.py --profile FAMILY[:ROW] …

Each turn is a process of its own. The peers are black boxes in an environment of their own (`make bench` makes it). With
`--write` the rows that were measured replace those of the same name in the table of `RESULTS.md`. With `--profile` nothing is
compared: it prints what our side takes, by kind of operation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
FAMILIES = ("kron", "diag", "last_layer", "predictive", "tuning", "large", "jobs")
OF_CUDA = "gpu"  # a family that is run where it is named and there is a device
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"
HEADER = "| work | ours | fastest peer | 10⁹ operations | reached | when |\n| --- | --- | --- | --- | --- | --- |"

sys.path.insert(0, str(HERE / "rows"))


def chosen(names: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield the family, name and row of what was asked for: `kron`, or `kron:exact-mlp`; everything if nothing was."""
    for name in names or FAMILIES:
        family, _, row = name.partition(":")
        if family not in (*FAMILIES, OF_CUDA):
            raise SystemExit(
                f"got {name!r}; expected one of {', '.join((*FAMILIES, OF_CUDA))}, or one of its rows, such as kron:exact-mlp"
            )
        rows = importlib.import_module(family).ROWS
        if row and row not in rows:
            raise SystemExit(f"got {name!r}; expected one of {', '.join(f'{family}:{other}' for other in rows)}")
        yield from ((family, other, rows[other]) for other in ([row] if row else rows))


def turn(python: str, family: str, name: str, side: str, threads: int) -> dict[str, float]:
    """Return the seconds by label of one process."""
    command = [python, "-W", "ignore", str(HERE / "rows" / "side.py"), family, name, side, str(threads)]
    own = {"PYTHONPATH": str(HERE.parent)} if side == "ours" else {}
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **own}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def profiled(family: str, name: str) -> None:
    """Print the profile of a row's own side, from a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "5", "PYTHONPATH": str(HERE.parent)}
    subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "rows" / "profiling.py"), family, name], env=environment, check=True
    )


def measured(python: str | None, family: str, name: str, row: Any, turns: int, threads: int) -> dict[str, Any]:
    """Return the medians of a row over some turns, and the fastest peer's over ours in pairs."""
    ours, peers = [], []
    for _ in range(turns):
        ours.append(turn(sys.executable, family, name, "ours", threads))
        if row.peers is not None and python is not None:
            peers.append(turn(python, family, name, "peers", threads))
    found: dict[str, Any] = {label: statistics.median(one[label] for one in ours) for label in ours[0]}
    if peers:
        medians = {label: statistics.median(one[label] for one in peers) for label in peers[0]}
        best = min(medians, key=medians.get)
        ratios = [min(p.values()) / o["ours"] for p, o in zip(peers, ours, strict=True)]
        found |= {"best": best, "best_seconds": medians[best], "peer": statistics.median(ratios), "spread": ratios}
    return found


def line(row: Any, found: Mapping[str, Any], when: str) -> str:
    """Return a row of the table."""
    peer = f"{found['best']} {found['best_seconds']:.3g} s" if "best" in found else "–"
    if "spread" in found:
        peer += f" ({min(found['spread']):.3g} to {max(found['spread']):.3g} ×)"
    values = [(target, target.value(found)) for target in row.targets]
    reached = "; ".join("no peer" if value is None else target.text(value) for target, value in values)
    work = (
        f"{found['gflop']:.0f}, {100 * found['gflop'] / found['ours'] / found['rate']:.0f} % of the rate"
        if "gflop" in found
        else "–"
    )
    return f"| {row.name} | {found['ours']:.3g} s | {peer} | {work} | {reached} | {when} |"


def machine(threads: int) -> str:
    """Return what this machine is, in a few words."""
    names = [
        text.partition(":")[2].strip()
        for text in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in text
    ]
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{threads} threads of {os.cpu_count()} × {names[0] if names else platform.processor()}{device}"


def write(lines: list[str], path: Path) -> None:
    """Put rows into the table of a file, in place of those of the same name."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    kept = [
        old for old in table.strip().splitlines()[2:] if old.split("|")[1] not in {new.split("|")[1] for new in lines}
    ]
    names = [f" {row.name} " for _, _, row in chosen([*FAMILIES, OF_CUDA])]
    rows = sorted([*kept, *lines], key=lambda old: names.index(old.split("|")[1]))
    path.write_text(f"{before}{BEGIN}\n{HEADER}\n" + "\n".join(rows) + f"\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="families, or family:row; all if none is named")
    parser.add_argument("--peer-python", help="of the peers' environment; rows without peers need none")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--note", help="of the machine's state, for the last column; its load before each row if not given"
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print what our side of the named rows takes instead")
    options = parser.parse_args()
    if any(name.partition(":")[0] == OF_CUDA for name in options.rows) and not torch.cuda.is_available():
        print(
            f"This machine has no CUDA device that torch {torch.__version__} can use: no row of {OF_CUDA!r} was measured."
        )
        return
    if options.profile:
        print(machine(1))
        for family, name, _ in chosen(options.rows):
            profiled(family, name)
        return
    print(machine(options.threads), HEADER, sep="\n")
    for family, name, row in chosen(options.rows):
        note = options.note or f"load {os.getloadavg()[0]:.1f}"
        found = measured(options.peer_python, family, name, row, options.turns, options.threads)
        new = line(row, found, note)
        print(new, flush=True)
        if options.write:
            write([new], HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
