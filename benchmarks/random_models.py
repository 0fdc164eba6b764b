"""Thousands of random small models against the dense float64 reference of the tests.

    python benchmarks/random_models.py                       # 5,000 models, what is wrong and a count
    python benchmarks/random_models.py --start 5000 --models 20000
    python benchmarks/random_models.py --device cuda         # the library on a GPU, the reference on the CPU
    python benchmarks/random_models.py --seed 123            # one model: its description, module, errors
    python benchmarks/random_models.py --not-yet             # those that the suite leaves out, by the reason

Ends with status 1 if a model that the suite would run is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.core.dense_reference import Reference  # noqa: E402
from tests.core.not_yet import CHECKS, NOT_YET, missing  # noqa: E402
from tests.core.random_models import plan  # noqa: E402
from tests.core.verdicts import examine  # noqa: E402


def one(seed: int) -> int:
    p = plan(seed)
    case = p.build()
    print(p, f"has to be {p.outcome}", case.model, sep="\n")
    print("left out of the suite by", missing(p.names) or "nothing")
    verdict = examine(p)
    print(verdict)
    if verdict.kind in ("wrong", "silent"):
        reference = Reference(p, case)
        print(f"summed loss {reference.loss:.6g}, norm of the GGN {float(reference.ggn.norm()):.6g}")
    return 0 if verdict.good else 1


def many(start: int, models: int) -> int:
    begin, kinds, bad = time.perf_counter(), Counter(), 0
    for seed in range(start, start + models):
        p = plan(seed)
        if missing(p.names):
            kinds["left out"] += 1
            continue
        verdict = examine(p)
        kinds[verdict.kind] += 1
        if not verdict.good and not (verdict.kind == "silent" and CHECKS & NOT_YET.keys()):
            bad += 1
            print(f"{p}\n    {verdict}", flush=True)
    print(f"{dict(kinds)} in {time.perf_counter() - begin:.0f} s")
    return 1 if bad else 0


def not_yet(start: int, models: int) -> int:
    """For every line of the table: how many models that only it leaves out are still wrong, and the first of them."""
    found = defaultdict(list)
    for seed in range(start, start + models):
        p = plan(seed)
        keys = missing(p.names)
        if len(keys) <= 1:
            verdict = examine(p)
            found[keys[0] if keys else next(iter(CHECKS))].append((p, verdict))
    for key, reason in NOT_YET.items():
        ours = [(p, v) for p, v in found[key] if key not in CHECKS or v.kind in ("silent", "right")]
        silent = key in CHECKS or not CHECKS & NOT_YET.keys()  # else warnings are a line of their own
        bad = [(p, v) for p, v in ours if not v.good and (v.kind != "silent" or silent)]
        kinds = dict(Counter(v.kind for _, v in bad))
        print(f"{key}: {len(bad)} of {len(ours)} {kinds or ''} ({reason})")
        print("    its line can go" if ours and not bad else "".join(f"    {p}\n    {v}" for p, v in bad[:1]))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--models", type=int, default=5000)
    parser.add_argument("--not-yet", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.seed is not None:
        return one(arguments.seed)
    return (not_yet if arguments.not_yet else many)(arguments.start, arguments.models)


if __name__ == "__main__":
    sys.exit(main())
