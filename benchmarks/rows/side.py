"""Time one row in one environment and print the seconds by label as JSON.

    python benchmarks/rows/side.py FAMILY ROW ours|peers

`bench.py` runs it in turns, so that a drift of the machine's speed meets both sides.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings

import torch
from harness import machine_rate, seconds

RUNS = 2


def main(family: str, name: str, side: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore")
    row = importlib.import_module(family).ROWS[name]
    timed = (row.ours if side == "ours" else row.peers)()
    found = {}
    for label, prepare in timed.items():
        try:
            found[label] = seconds(prepare, RUNS) if callable(prepare) else prepare
        except Exception as error:  # a peer's backend may not do a row; another one is compared with then
            if side == "ours" or len(timed) == 1:
                raise
            print(f"{label} cannot do {family}:{name}: {type(error).__name__}: {error}", file=sys.stderr)
    if side == "ours" and row.gflop is not None:
        found |= {"gflop": row.gflop(), "rate": machine_rate()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
