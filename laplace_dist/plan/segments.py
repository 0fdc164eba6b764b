"""Segments: contiguous ranges of examples, a pure function of the length of the data and the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from laplace_dist.errors import SettingsError


@dataclass(frozen=True, order=True)
class Segment:
    """A contiguous range of examples, `start <= i < stop`: the unit of work and of loss."""

    id: str
    start: int
    stop: int
    group = 0  # the only module group of its sums, unless there are several: see `plan.groups.Unit`

    def __str__(self) -> str:
        return f"{self.id} (examples {self.start} to {self.stop - 1})"


def plan_segments(n: int, segment_size: int, batch_size: int) -> list[Segment]:
    """Cut `range(n)` into segments of equal size, the last one possibly shorter.

    Args:
        n: Number of examples.
        segment_size: Examples per segment, rounded up to whole batches so that batches do not depend on it.
        batch_size: Examples per batch.

    Raises:
        SettingsError: A number is below 1.
    """
    if n < 1:
        raise SettingsError(f"--data: got an empty data set ({n} examples in the train split); expected at least 1")
    for flag, value in (("--segment-size", segment_size), ("--batch-size", batch_size)):
        if value < 1:
            raise SettingsError(f"{flag}: got {value}; expected at least 1 example")
    step = whole_batches(segment_size, batch_size)
    return [Segment(f"{i:06d}", start, min(start + step, n)) for i, start in enumerate(range(0, n, step))]


def default_segment_size(n: int, batch_size: int) -> int:
    """Return the segment size, in examples, that is used when none is given.

    A segment ends in a commit: pack, compress, flush, read back. On one core it costs about 25 ns per entry of a d x d
    factor (0.4 s for d = 4096), and a fixed 3 ms per factor. A batch of 256 in an exact GGN fit of 10 classes takes
    some 20 products of 256 x d by d x d for the passes and the Gram matrices, at 50 GFLOP/s about 200 ns per entry, of
    two factors. So a commit to a directory costs about a quarter of a batch; to an object store, with some sixty
    requests, half a batch. 32 batches per segment keep both under 2 % of the time. It is more where a batch is cheap
    beside its factors: one output, small batches, a GPU. Give the segment size there.

    Against that stand the balance between workers and the work lost in a crash, which want many segments. The rule:

    * about 32 batches per segment; fewer, twice the square root of their number, where there are less than 256 batches
      in all and the whole fit is short;
    * more than 32 where there would otherwise be more than 4096 segments;
    * segments of even size whose number is a multiple of 4 where whole batches allow it, so that 2 or 4 workers
      finish together.

    Args:
        n: Number of examples.
        batch_size: Examples per batch.
    """
    batches = max(1, math.ceil(n / batch_size))
    wanted = max(min(32, 2 * (math.isqrt(batches - 1) + 1)), math.ceil(batches / 4096))
    count = 4 * math.ceil(math.ceil(batches / wanted) / 4)
    return math.ceil(batches / count) * batch_size


def plan_shards(n: int, batch_size: int) -> list[Segment]:
    """Cut a split that is scored, not summed, into shards: segments of the default size."""
    return plan_segments(n, default_segment_size(n, batch_size), batch_size)


def whole_batches(size: int, batch_size: int) -> int:
    """Round a number of examples up to whole batches."""
    return math.ceil(size / batch_size) * batch_size
