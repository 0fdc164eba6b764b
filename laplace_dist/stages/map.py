"""Map: the curvature of one segment, committed as a partial."""

from __future__ import annotations

from typing import Any

from laplace_dist.plan.segments import Segment
from laplace_dist.run import attempts, partials
from laplace_dist.stages.context import Context


def map_segment(context: Context, segment: dict[str, Any]) -> dict[str, Any]:
    """Accumulate the curvature of one segment and commit it as a partial.

    Args:
        context: The worker's model, data and store.
        segment: A segment's `id`, `start` and `stop`.

    Returns:
        A small receipt: who won the commit, the number of bytes and seconds it took.
    """
    part = Segment(**segment)
    sums = context.la.zero_sums()
    for offset, x, y in context.batches("train", part.start, part.stop):
        context.la.accumulate(sums, x, y, offset=offset)
    receipt = partials.commit_partial(
        context.store, context.plan, part, sums.to_tensors(), sums.n_data, attempts.new_attempt()
    )
    return {"segment": part.id, "examples": part.stop - part.start, "won": receipt.won, "seconds": receipt.seconds}
