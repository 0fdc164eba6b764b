"""What a fit will take, as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from laplace_dist.plan.estimate import Estimate
from laplace_dist.report.progress import clock

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def lines(found: Estimate) -> Iterator[str]:
    """Yield an estimate line by line, and what limits last."""
    kinds = ", ".join(f"{n} tensors {kind} ({share:.1%} of the weights)" for kind, (n, share) in found.coverage.items())
    name, width = found.largest
    workers = f"{found.workers} worker" + ("s" if found.workers > 1 else "")
    yield f"model      {found.parameters:,} weights: {kinds}"
    yield f"estimator  {found.estimator}"
    yield f"factors    {found.factors}, the largest {name} of width {width:,}; {size(found.sums_bytes)} of sums in a worker"
    if found.module_groups > 1:
        yield f"groups     {found.module_groups} module groups, so as many passes over the data; the sums are of the largest"
    if found.weights is not None:
        yield f"weights    {weights_line(*found.weights)}"
    yield f"segments   {found.segments:,} with {found.batches:,} batches; {size(found.partial_bytes)} of each is stored"
    yield f"storage    {size(found.stored_bytes)} while the partials are kept"
    yield f"requests   {found.writes:,} writes and {found.reads:,} reads; ${found.dollars:.2f} on S3"
    yield (
        f"memory     {size(found.peak_bytes)} at a mapping worker's peak; {size(found.posterior_bytes)} of posterior in one "
        "that tunes or evaluates"
    )
    yield (
        f"time       map {clock(found.map_seconds)}, commits {found.commit_share:.1%} of it; reduce "
        f"{clock(found.reduce_seconds)}; on {workers} as fast as this machine"
    )
    yield from (f"note       {text}" for text in found.advice)


def weights_line(n_examples: int, weights: Mapping[str, Any]) -> str:
    """Return in a line what the weights of the training data are, from what a plan says of them."""
    zero = f", {weights['zero']:,} of them 0" if weights["zero"] else ""
    return f"{weights['name']!r} of {n_examples:,} examples: they sum to {weights['sum']:,.10g}{zero}"


def size(n_bytes: float) -> str:
    """Write bytes with three digits and a unit, a thousand of one being one of the next."""
    for unit in _UNITS:
        if n_bytes < 999.5 or unit == _UNITS[-1]:
            break
        n_bytes /= 1000
    return f"{n_bytes:.3g} {unit}"
