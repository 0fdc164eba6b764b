"""Map: the curvature of one segment, committed as a partial."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from laplace_dist.plan.plan import Plan
from laplace_dist.plan.segments import Segment
from laplace_dist.plan.sketch import ExampleDigests, limit_of
from laplace_dist.plan.worker_memory import BESIDE
from laplace_dist.run import lifecycle, partial_manifests, partials
from laplace_dist.run.attempts import new_attempt
from laplace_dist.run.provenance import environment, node
from laplace_dist.stages.context import Context


@dataclass(frozen=True)
class MapSegment:
    """Accumulate the curvature of one segment, or one module group of it, and commit it as a partial.

    Attributes:
        plan: Digest of the plan.
        segment: The segment, and which group of its sums.
    """

    plan: str
    segment: Segment

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"segment {self.segment}"

    def run(self, context: Context) -> dict[str, Any] | Callable[[], dict[str, Any]]:
        """Do so; the receipt says who won the commit and how many seconds that took. The commit of small sums may wait."""
        segment, plan = self.segment, context.window_of(self.plan).plan
        sums, digest = context.zero_sums(plan, segment.group), hashlib.sha256()
        examples, seen = ExampleDigests(limit_of(plan.n_examples)), 0
        read = context.weighted_batches("train", plan.data, segment.start, segment.stop, digest, examples)
        for offset, x, y, weights in read:
            context.la.accumulate(sums, x, y, offset=offset, example_weights=weights)
            seen += len(y)
        assert seen == segment.stop - segment.start, f"{seen} targets were read of segment {segment}"
        tensors = sums.to_tensors()
        made = {"data_sha256": digest.hexdigest(), "environment": environment(context.device)}
        made["examples"] = None if (found := examples.sketch) is None else found.to_values()
        commit = partial(self._commit, context, tensors, sums.n_data, made)
        return commit if sum(tensor.nbytes for tensor in tensors.values()) <= BESIDE else commit()

    def _commit(self, context: Context, tensors: Mapping[str, Tensor], n_data: float, made: Any) -> dict[str, Any]:
        segment, window = self.segment, context.window_of(self.plan)
        receipt = partials.commit_partial(window.store, window.plan, segment, tensors, n_data, new_attempt(), **made)
        count = segment.stop - segment.start
        return {"examples": count, "won": receipt.won, "seconds": receipt.seconds, "bytes": receipt.bytes}


@dataclass(frozen=True)
class CompareData:
    """Read the data of a committed segment again and compare its digest with the one in the partial's manifest.

    Attributes:
        plan: Digest of the plan.
        segment: The segment.
    """

    plan: str
    segment: Segment

    @property
    def what(self) -> str:
        """The task in a person's words."""
        return f"comparison of the data of segment {self.segment}"

    def run(self, context: Context) -> dict[str, Any]:
        """Do so.

        Raises:
            RunFailed: The data are not those that the partial was made of.
        """
        segment, digest, window = self.segment, hashlib.sha256(), context.window_of(self.plan)
        for _ in context.batches("train", window.plan.data, segment.start, segment.stop, digest):
            pass
        manifest = partial_manifests.read_manifest(window.store, window.plan, segment)
        partial_manifests.check_same_data(manifest, digest.hexdigest(), node())
        return {}


def comparisons(plan: Plan, done: Collection[str]) -> list[CompareData]:
    """Return tasks that compare the data of three committed segments, the first, the last and one between.

    Args:
        plan: The plan.
        done: Ids of the committed units.
    """
    found = {unit.start: unit for unit in plan.units if unit.id in done}
    there = [found[at] for at in sorted(found)]
    chosen = {index: there[index] for index in (0, len(there) // 2, len(there) - 1)} if there else {}
    return [CompareData(plan.digest, unit) for unit in chosen.values()]


def tasks(plan: Plan, done: Collection[str]) -> Iterator[MapSegment]:
    """Yield a task for every unit that has no committed partial, in plan order."""
    return (MapSegment(plan.digest, unit) for unit in lifecycle.remaining(plan, done))
