"""What a row's own side takes: CPU time of one thread by kind of operation, its rate where it is a product, and page faults.

    python benchmarks/bench.py --profile kron:exact-cnn jobs:resnet-diag

A process of its own runs the row once to warm up, once for the time, once under `torch.profiler` for the shares, and where
much of the time is outside of operations once under `cProfile` for the functions. Operations count their own time alone, by the
clock: beside other work look at the shares.
"""

from __future__ import annotations

import cProfile
import importlib
import pstats
import re
import resource
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from harness import Prepare
from torch.profiler import ProfilerActivity, profile

KINDS = {  # by the name of an operation, the first that fits
    "products": r"aten::(mm|addmm|addmm_|bmm|baddbmm|baddbmm_|mv|dot|addbmm)$|mkldnn::_linear_pointwise",
    "convolutions, backward": r"aten::.*conv.*backward",
    "convolutions, forward": r"aten::.*conv",
    "patches": r"aten::(im2col|col2im)",
    "decompositions": r"aten::(_?linalg|cholesky|triangular_solve)",
    "norms, attention and pools, backward": r"aten::.*(norm|attention|softmax|pool).*backward",
    "norms, attention and pools": r"aten::.*(norm|attention|softmax|pool)",
    "copies": r"aten::(copy_|cat|stack|clone|contiguous|_to_copy|index|gather|scatter|select_backward|slice_backward|repeat)",
    "clearing and taking memory": r"aten::(zero_|fill_|zeros|empty|resize_|new_)",
    "sums and extremes": r"aten::(sum|mean|amax|amin|max|min|all|any|cumsum|argmax|sort|topk|unique)",
    "views": r"aten::(view|reshape|transpose|t|as_strided|expand|permute|unsqueeze|squeeze|slice|select|split|narrow|unbind|"
    r"detach|flatten|unflatten|alias|lift_fresh|_unsafe_view|_reshape_alias|numpy_T|mT)$",
    "elementwise": r"aten::",
}
SIDES = (512, 128, 32)  # of products: all of their three sides are at least so long
LEAST = 0.005  # share of the time from which a kind is shown
MUCH = 0.25  # share of the time outside of operations from which functions are shown
FUNCTIONS = 8


def kind_of(name: str, shapes: Iterable[Any]) -> str:
    """Return the kind of an operation; that of products says how short their shortest side is."""
    kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "backward passes' bookkeeping")
    if kind != "products" or (sides := sides_of(name, shapes)) is None:
        return kind
    shortest = min(sides[-3:])
    bound = next((bound for bound in SIDES if shortest >= bound), None)
    return f"products, shortest side ≥ {bound}" if bound else f"products, shortest side < {SIDES[-1]}"


def sides_of(name: str, shapes: Iterable[Any]) -> tuple[int, ...] | None:
    """Return `(batch, m, k, n)` of the last two matrices among an operation's inputs; None if there are no two."""
    matrices = [tuple(shape) for shape in shapes if len(shape) in (2, 3)][-2:]
    if name.startswith("mkldnn::") and len(matrices) == 2:  # which takes the second one transposed
        matrices[1] = matrices[1][::-1]
    if len(matrices) < 2 or matrices[0][-1] != matrices[1][-2]:
        return None
    left, right = matrices
    return (left[0] if len(left) == 3 else 1), left[-2], left[-1], right[-1]


def _operations(name: str, shapes: Iterable[Any]) -> float:
    sides = sides_of(name, shapes)
    return 0.0 if sides is None else 2.0 * sides[0] * sides[1] * sides[2] * sides[3]


def table(prepare: Prepare) -> list[str]:
    """Return the lines of the profile of what is prepared."""
    prepare()()
    run = prepare()
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    run()
    seconds, after = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF)
    run = prepare()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as found:
        begun = time.perf_counter()
        run()
        watched = time.perf_counter() - begun
    spent, work, calls, names = Counter(), Counter(), Counter(), defaultdict(Counter)
    for one in found.key_averages(group_by_input_shape=True):
        own = one.self_cpu_time_total / 1e6
        kind = kind_of(one.key, one.input_shapes)
        spent[kind], calls[kind] = spent[kind] + own, calls[kind] + one.count
        names[kind][one.key.removeprefix("aten::")] += own
        if kind.startswith("products"):
            work[kind] += one.count * _operations(one.key, one.input_shapes)
    outside = watched - spent.total()
    lines = ["| kind | share | calls | 10⁹ operations/s | mostly |", "| --- | --- | --- | --- | --- |"]
    for kind, own in spent.most_common():
        rate = f"{work[kind] / own / 1e9:.0f}" if work[kind] else "–"
        mostly = ", ".join(name for name, _ in names[kind].most_common(3))
        if own >= LEAST * watched:
            lines.append(f"| {kind} | {100 * own / watched:.0f} % | {calls[kind]:,} | {rate} | {mostly} |")
    lines.append(f"| outside of operations: Python, files | {100 * outside / watched:.0f} % | – | – | – |")
    lines.append(
        f"\n{seconds:.3g} s of CPU without a profiler, of which the kernel {after.ru_stime - before.ru_stime:.2g} s, for "
        f"{after.ru_minflt - before.ru_minflt:,} page faults; {watched:.3g} s under it."
    )
    return lines + (_functions(prepare()) if outside > MUCH * watched else [])


def _functions(run: Callable[[], object]) -> list[str]:
    """Return the functions of Python that take most time themselves, under a profiler that slows them down."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(run)
    stats = pstats.Stats(profiler).stats
    whole = sum(own for _, _, own, _, _ in stats.values())
    longest = sorted(stats.items(), key=lambda item: -item[1][2])[:FUNCTIONS]
    return ["\nLongest by themselves under cProfile:"] + [
        f"- {100 * own / whole:.0f} % `{function}` ({file.rpartition('/site-packages/')[2]}:{at}), {calls:,} calls"
        for (file, at, function), (_, calls, own, _, _) in longest
    ]


def main(family: str, name: str) -> None:
    """Print the profiles of a row: of all that it times on our side, or of what it names for this."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row = importlib.import_module(family).ROWS[name]
    timed = row.profiled() if row.profiled is not None else row.ours()
    for label, prepare in timed.items():
        if isinstance(prepare, list):
            print(f"\n### {row.name}: {label}\n", *prepare, sep="\n", flush=True)
            continue
        if not callable(prepare):
            print(f"\n{family}:{name} measures processes of its own: {label} is {prepare:.3g}, without a profile.")
            continue
        print(f"\n### {row.name}" + ("" if label == "ours" else f": {label}") + "\n")
        print(*table(prepare), sep="\n", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
