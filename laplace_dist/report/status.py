"""How far a run is, for people who look from anywhere: a few lines from its checkpoint alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from laplace_dist.errors import MissingObjectError
from laplace_dist.report.rate import duration
from laplace_dist.run import journal, lifecycle
from laplace_dist.run.checkpoint import Checkpoint
from laplace_dist.run.ownership import read_plan, refuse_no_run
from laplace_dist.run.pointer import read_current

JOBS = 5  # the newest, which are shown
SILENT = 120.0  # seconds without a word, after which that is said of a job at work


def observed(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what `laplace_dist.status` does, with the current version and the records of the newest jobs.

    Raises:
        SettingsError: There is no run.
        CheckpointError: Part of it is truncated or altered.
    """
    store = Checkpoint(url, storage_options)
    refuse_no_run(store)
    try:
        current = read_current(store)
    except MissingObjectError:
        current = None
    jobs = journal.records(store, read_plan(store), JOBS)
    return {**lifecycle.status(url, storage_options), "current": current, "jobs": jobs}


def at_work(found: Mapping[str, Any]) -> bool:
    """Say whether the newest job is at work, as far as it has said."""
    return bool(found["jobs"]) and found["jobs"][-1]["state"] == "at work"


def lines(found: Mapping[str, Any], now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Iterator[str]:
    """Yield the lines for people.

    Args:
        found: `observed(...)`.
        now: The clock that silence is counted by.
    """
    whole = "complete" if found["complete"] else "not complete"
    yield f"run        {found['url']}"
    if "epochs" in found:
        yield f"training   {found['epochs']:,} epochs are committed"
    groups = ""
    if "module_groups" in found:
        count = found["module_groups"]
        groups = (
            f" in {count} module groups ({found['partials_committed']:,} of {found['segments'] * count:,} partials)"
        )
    yield (
        f"first fit  {found['segments_committed']:,} of {found['segments']:,} segments{groups}, "
        f"{found['examples_committed']:,} of {found['examples']:,} examples: {whole}"
    )
    if "second_pass" in found:
        yield f"then       {found['second_pass']:,} of {found['segments']:,} segments in the second pass"
    current = found["current"]
    tuned = "" if current is None else ", tuned" if current["tuning"] else ", not tuned"
    yield f"posterior  {'none yet' if current is None else current['version'] + tuned}"
    for record in found["jobs"]:
        yield f"job        {_job(record, now())}"
    if not found["jobs"]:
        yield "job        no record of any: none has begun its work, or a version that kept none wrote the run"


def _job(record: Mapping[str, Any], now: datetime) -> str:
    window = f" of window {record['window']}" if record["window"] else ""
    begun = datetime.fromisoformat(record["begun"])
    text = f"{begun:%Y-%m-%d %H:%M} UTC {record['job']}{window} on {record['node']}: {record['state']}"
    if record["state"] != "at work":
        why = f" ({record['why']})" if record["why"] else ""
        return f"{text} after {duration(record['seconds'])}{why}"
    silent = (now - begun).total_seconds() - record["seconds"]
    parts = [f"{text} for {duration(record['seconds'])}", *_stage(record)]
    parts += [f"nothing heard for {duration(silent)}, it may be dead"] if silent > SILENT else []
    return ", ".join(parts)


def _stage(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the stage at work is at."""
    stage = record["stages"][-1]
    yield f"{stage['stage']} {stage['done']:,}/{stage['total']:,} {stage['unit']}"
    done = stage["done"] - stage["before"]
    if stage["examples"] and stage["seconds"]:
        yield f"{stage['examples'] / stage['seconds']:.0f} examples/s"
    if done and stage["done"] < stage["total"]:
        yield f"{duration(stage['seconds'] / done * (stage['total'] - stage['done']))} left"
    if record["workers"]:
        yield f"{record['workers'][-1][1]} worker(s)"
    for name, text in (("retries", "retried"), ("lost", "lost with their nodes")):
        if count := sum(own[name] for own in record["stages"]):
            yield f"{count} {text}"
