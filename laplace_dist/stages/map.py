"""Map: the curvature of one segment, committed as a partial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.run import lifecycle, partials
from laplace_dist.run.attempts import new_attempt
from laplace_dist.stages.context import Context
from laplace_dist.storage.store import Store


@dataclass(frozen=True)
class MapSegment:
    """Accumulate the curvature of one segment and commit it as a partial.

    Attributes:
        plan: Digest of the plan.
        segment: The segment.
    """

    plan: str
    segment: Segment

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"segment {self.segment}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so; the receipt says who won the commit and how many seconds that took."""
        segment = self.segment
        sums = context.la.zero_sums()
        for offset, x, y in context.batches("train", segment.start, segment.stop):
            context.la.accumulate(sums, x, y, offset=offset)
        receipt = partials.commit_partial(
            context.store, context.plan, segment, sums.to_tensors(), sums.n_data, new_attempt()
        )
        return {"examples": segment.stop - segment.start, "won": receipt.won, "seconds": receipt.seconds}


def tasks(store: Store, plan: Plan) -> tuple[Iterator[MapSegment], int]:
    """Return a task for every segment that has no committed partial, in plan order, and how many segments have one."""
    done = lifecycle.committed(store, plan, arrays=False)
    return (MapSegment(plan.digest, segment) for segment in lifecycle.remaining(plan, done)), len(done)
