"""A verification from settings to lines for people: in this process, or its checks spread over a pool of workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from laplace_dist.config.settings import Config
from laplace_dist.errors import SettingsError
from laplace_dist.execution.session import ExecutorType, Session
from laplace_dist.report.progress import Progress
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.checks import Check
from laplace_dist.run.findings import Findings
from laplace_dist.run.ownership import read_plan
from laplace_dist.run.verify import Report, check_run
from laplace_dist.stages import verify as stage


def verify(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    collect_orphans_older_than: float | None = None,
    shallow: bool = False,
    data: Any = None,
    executor: ExecutorType | None = None,
    workers: Config | None = None,
) -> Report:
    """Read and check a whole run: plan, weights, manifests, arrays, sums, posterior versions, tuning, evaluation.

    Every number is read and compared with its digests; where all partials are there, they are summed again and compared with
    the window's sum, and that with the posterior version, bit for bit. Nothing is repaired. By default this process does all of
    it; on a pool each task checks one part of everything, some factors, or the data of a segment, and the report is the same.

    Args:
        url: Checkpoint directory or URL.
        storage_options: For the file system of the URL.
        collect_orphans_older_than: Delete attempts that no manifest names and that were last written more than so
            many hours ago, and before every job began that is at work: what it will name is not named yet.
        shallow: Check manifests, and that the arrays that they name are there, without reading them; in this process.
        data: Every segment's data are read again and compared with the digest of what was read when it was computed: the
            training split of the first window, as a map-style data set; a mapping from the names of windows to theirs; a
            function from the name of a window to its split; or, on a pool, True: that of the first window as the settings of
            the workers name it, those of the others as their own settings do.
        executor: Where the checks are carried out, such as `laplace_dist.Inline`; what `workers` says if not given.
        workers: Settings of the workers, `ray_address` and the like: the checks are carried out on a pool. Those of model and
            data are looked at only where `data` is True.

    Raises:
        SettingsError: The URL cannot be read, holds no run, or holds one of a newer version.
        StorageError: The storage does not answer.
        RunFailed: A check cannot be carried out on any worker.
    """
    store = Checkpoint(url, storage_options)
    on_pool = not shallow and (executor is not None or workers is not None)
    if (data is True and not (on_pool and workers)) or (on_pool and data not in (None, True)):
        raise SettingsError(
            "data: on a pool every worker opens its own, so give data=True, and workers= settings; elsewhere give the training "
            "split, a mapping from windows to theirs, or a function that opens that of a window"
        )
    if not on_pool:
        return check_run(store, collect_orphans_older_than, shallow=shallow, data=data)
    place = url if "://" in url else os.path.abspath(os.path.expanduser(url))
    given = {"checkpoint": place, "storage_options": dict(storage_options or {}), **_CPU}
    config = (workers or Config(model="-", data="-", checkpoint=place)).model_copy(update=given)
    session = Session(config, store, executor, logging.getLogger("laplace_dist").info, commits=False)

    def carry_out(kind: str, checks: Sequence[Check]) -> list[Findings]:
        tasks = stage.tasks(read_plan(store), checks)
        receipts = session.run(tasks, "cpu", Progress("verify", kind, len(tasks)), keep=True, alike=False)
        found = {receipt["number"]: receipt["findings"] for receipt in receipts}
        return [found[number] for number in range(len(checks))]

    try:
        return check_run(store, collect_orphans_older_than, data=data, pool=carry_out)
    finally:
        session.close()


_CPU = {"device": "cpu", "gpus_per_worker": 0.0}  # nothing is computed on one


def lines(report: Report) -> Iterator[str]:
    """Yield the lines of a report for people, one per bad object and orphan."""
    yield from (f"bad     {key}: {text}" for key, text in report.problems)
    yield from (f"note    {key}: {text}" for key, text in report.notes)
    for place, age in report.orphans.items():
        done = "deleted" if place in report.collected else "orphan "
        yield f"{done} {place}: no manifest names it; last written {age:.1f} hours ago"
    yield from (f"made    {count} results with {kind}" for kind, count in report.environments.most_common())
    state = "every one of them is whole" if report.ok else f"{len(report.problems)} problem(s)"
    yield (
        f"{report.url}: {report.objects} objects, {state}; {report.committed} of {report.segments} segments committed, "
        f"{len(report.versions)} posterior version(s), {len(report.orphans)} orphan(s), {len(report.collected)} deleted"
    )
