"""Agreement with laplace-torch 0.3, run as a black box on the same weights and data.

    python benchmarks/parity.py --peer-python PATH/TO/PEER/ENV/bin/python

Prints one row per likelihood × structure × subset × peer backend: the largest relative difference (Frobenius norm) over
networks of the posterior precision, the evidence and the predictive, in float64 and float32. Rows
above 1e-9 (float64) say which side is right and why.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
_WHAT = ("precision", "evidence", "predictive")
_TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def explanation(likelihood: str, structure: str, subset: str, backend: str) -> str:
    """Why the two libraries differ in a row, where they do."""
    if (structure, subset, backend) == ("diag", "last_layer", "curvlinops EF"):
        return (
            "ours: it is the diagonal of the full last-layer EF, on which all backends agree for classification; so are the "
            "peer's own asdl and backpack rows"
        )
    if likelihood == "regression" and backend.endswith("EF"):
        return (
            "ours is the sum of gradient outer products of ½|f - y|², gradient f - y; the peer's is twice that: it halves the "
            "product of two gradients 2 (f - y) of |f - y|² once"
        )
    if (structure, backend) == ("kron", "backpack GGN"):
        return (
            "convolutions only, the MLP agrees to 1e-14: ours is KFAC-expand, as are the peer's curvlinops and asdl rows; "
            "BackPACK combines the positions of a convolution in another way"
        )
    return "UNEXPLAINED"


def side(python: str, which: str, folder: Path) -> dict:
    """All numbers of one library."""
    out = folder / f"{which}.pt"
    environment = {**os.environ, "PYTHONPATH": str(_HERE.parent)} if which == "ours" else None
    command = [python, "-W", "ignore", str(_HERE / "parity_side.py"), "--which", which, "--out", str(out)]
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    return torch.load(out, weights_only=True)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300))


def compare(ours: dict, theirs: dict) -> dict[tuple[str, ...], dict[str, str | float]]:
    """Largest differences by (likelihood, structure, subset, backend)."""
    rows: dict[tuple[str, ...], dict[str, str | float]] = {}
    for key, peer in theirs.items():
        dtype, kind, likelihood, structure, subset, backend = key.split("|")
        mine = ours["|".join([dtype, kind, likelihood, structure, subset, "native " + backend.split()[1]])]
        row = rows.setdefault((likelihood, structure, subset, backend), {})
        if "error" in mine:
            row["ours"] = mine["error"]
        if "error" in peer:
            row[f"peer fails ({kind})"] = peer["error"]
            continue
        for what in _WHAT:
            name = f"{what} {dtype}"
            row[name] = max(row.get(name, 0.0), difference(mine[what], peer[what]))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = side(sys.executable, "ours", Path(folder))
        theirs = side(arguments.peer_python, "theirs", Path(folder))
    columns = [f"{what} {dtype}" for dtype in ("float64", "float32") for what in _WHAT]
    print("| likelihood | structure | subset | peer backend | " + " | ".join(columns) + " | notes |")
    print("|" + " --- |" * (len(columns) + 5))
    for key, row in compare(ours, theirs).items():
        cells = [f"{row[c]:.0e}" if c in row else "–" for c in columns]
        notes = "; ".join(f"{name}: {value}" for name, value in row.items() if isinstance(value, str))
        if any(row.get(c, 0.0) > _TOLERANCE[c.split()[1]] for c in columns):
            notes = "; ".join(filter(None, [explanation(*key), notes]))
        print("| " + " | ".join([*key, *cells, notes]) + " |")


if __name__ == "__main__":
    main()
